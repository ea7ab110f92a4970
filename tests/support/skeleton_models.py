"""Models without their work, to drive a peer's hooks through thousands of steps: every module answers what it was given.

The modules, their names and classes are the real ones, so that a peer finds what it would find; only `forward` is gone.
What really ran is recorded evaluation by evaluation, and is what a schedule of ours is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.hooks import HookRegistry
from torch import nn

from prebake.exporter.caches import Schedule
from prebake.exporter.sites.component import Component
from support.cache_peers import Clock

SCHEDULERS = {
    "ddim": lambda n: scheduled(DDIMScheduler(), n),
    "flow": lambda n: scheduled(FlowMatchEulerDiscreteScheduler(), n),
    "flow, shift 3": lambda n: scheduled(FlowMatchEulerDiscreteScheduler(shift=3.0), n),
    "flow, dynamic shift": lambda n: scheduled(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), n, mu=1.15),
    "heun": lambda n: scheduled(FlowMatchHeunDiscreteScheduler(), n),
}


def scheduled(scheduler: Any, steps: int, **kwargs: Any) -> tuple[float, ...]:
    """The timesteps that the denoiser is evaluated at; Heun's has two evaluations a step."""
    scheduler.set_timesteps(steps, **kwargs)
    return tuple(float(t) for t in scheduler.timesteps)


def model_of(component: Component) -> nn.Module:
    """The diffusers model in a component; with guidance, that of the conditional branch."""
    prefix = component.branches.get("cond", component.branches.get("", ""))
    return component.module.get_submodule(prefix.removesuffix("."))


def ran(
    model: nn.Module,
    names: Sequence[str],
    timesteps: Sequence[float],
    apply: Callable[[nn.Module, Clock], None],
    batch: int = 1,
) -> list[set[str]]:
    """Which of the modules called `names` ran at each timestep, with the hooks that `apply(model, clock)` puts on.

    A model is called with a `batch`; it calls each of them once. In a guided run (batch 2) "uncond" ran where both
    halves arrived there.
    """
    model = copy.deepcopy(model)
    record: list[set[str]] = []

    def answer(name: str):
        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            record[-1].add(name)
            return hidden_states

        return forward

    def root(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        if len(hidden_states) == 2:
            record[-1].add("uncond")
        for name in names:
            model.get_submodule(name)(hidden_states=hidden_states)
        return (hidden_states,)

    for name in names:
        model.get_submodule(name).forward = answer(name)
    model.forward = root
    clock = Clock(SimpleNamespace(timesteps=timesteps))  # pyright: ignore[reportArgumentType]
    apply(model, clock)
    x = torch.zeros(batch, 1, 2, 2)
    for clock.e in range(len(timesteps)):
        record.append(set())
        model(hidden_states=x)
    return record


def in_context(model: nn.Module) -> None:
    """One context for all calls, as diffusers' pipelines set it, also on a model that is no `CacheMixin`."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    HookRegistry.check_if_exists_or_initialize(model)
    _set_cache_context(model, CacheContext("all"))


def computed(schedule: Schedule, names: Sequence[str], branch: str = "") -> list[set[str]]:
    """Which of the modules called `names` each decision of ours computes; what is not marked computes."""
    sites = {f"{branch}/{n}" if branch else n: n for n in names}
    return [{n for s, n in sites.items() if d.actions.get(s, "compute") == "compute"} for d in schedule.decisions]
