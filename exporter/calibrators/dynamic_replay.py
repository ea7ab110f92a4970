"""A cache that decides as it goes, replayed in eager: what its authors' code does at run time, evaluation by evaluation.

A data-dependent method has two files. `caches/<method>.py` (torch-free) freezes what was decided into a plan:

    marks(cache, layout) -> tuple[Mark, ...]              the sites that it stores and combines
    decision(cache, layout, history) -> Decision          the actions at the last entry of `history`, which holds what
                                                          every evaluation so far computed: {key: computed?}
    schedule(cache, layout, trajectory, calibration)      `calibration.freeze_decisions` gives the history, `decision` the actions

`calibrators/<method>.py` (torch) decides:

    probes(cache, layout) -> tuple[Mark, ...]             sites whose fresh values carry the signal; their modules run on the
                                                          current latents also where the rest is skipped
    class Online(cache, layout, table)                    the rule, and its memory of one trajectory; see `OnlineRule` below

Keys are branches, or parts of branches that decide apart (two lists of blocks: `cond/single_transformer_blocks`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ...runtime.replay import Tensors, apply_update, scale_tensor, slot_inputs, store_sites
from ..caches import Decision
from ..plan import PlanSet, list_actions
from ..plan.sampler import SchedulerTable
from ..sites.component import Component
from ..sites.marks import Mark, Variant
from .eager_replay import describe_sites, eager_variant


class OnlineRule(Protocol):
    """An online rule and its memory. `rounds` is how often it has to look at one evaluation before all keys are decided:
    2 where the signal of one key depends on what another one does at that same evaluation."""

    rounds: int = 1

    def decide(self, e: int, timestep: float, signals: Mapping[str, Tensor]) -> Mapping[str, bool]:
        """Key -> whether it computes at evaluation e, called `rounds` times for each e. `signals` are the fresh values of
        the probes and marks by tensor name (`site:0`): of a run in which every key that is not decided yet computes, and
        the decided ones do what was decided. Keys that a later round decides are left out of the answer."""
        ...


@dataclass
class DynamicTrace:
    """One trajectory: each evaluation's decisions and output, and the final latents."""

    decisions: list[dict[str, bool]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None


class SamplerLoop:
    """The sampler's loop, driven from outside: `inputs()` of the evaluation at hand, then `advance(sample)`."""

    def __init__(
        self,
        table: SchedulerTable,
        inputs: Mapping[str, Tensor],
        latents: Tensor,
        *,
        timestep_scale: float = 1.0,
        noise: Iterable[Tensor] = (),
    ) -> None:
        self.table, self.given, self.timestep_scale = table, inputs, timestep_scale
        self.e, self.latents, self.draws = 0, latents, iter(noise)
        depth = max(len(part) for u in table.updates for part in (u.latents, u.outputs))
        self.starts: deque[Tensor] = deque(maxlen=depth)
        self.outputs: deque[Tensor] = deque(maxlen=depth)

    def inputs(self) -> dict[str, Tensor]:
        timestep = torch.tensor([self.table.timesteps[self.e] * self.timestep_scale], dtype=torch.float32)
        latents = scale_tensor(self.latents, self.table.input_scales[self.e])
        return {**self.given, "hidden_states": latents, "timestep": timestep}

    def advance(self, sample: Tensor) -> None:
        self.starts.appendleft(self.latents)
        self.outputs.appendleft(sample)
        self.latents = apply_update(self.table.updates[self.e], self.starts, self.outputs, self.draws)
        self.e += 1


def dynamic_replay(
    component: Component,
    marks: tuple[Mark, ...],
    probes: tuple[Mark, ...],
    online: OnlineRule,
    decision_of: Callable[[Sequence[Mapping[str, bool]]], Decision],
    table: SchedulerTable,
    inputs: Mapping[str, Tensor],
    latents: Tensor,
    *,
    timestep_scale: float = 1.0,
    noise: Iterable[Tensor] = (),
) -> DynamicTrace:
    """The trajectory that `online` decides on.

    Each evaluation runs once with everything computed, and again for each further set of actions that its answers lead
    to; the last of these runs is the one that counts. A site that is skipped there stores nothing. `decision_of` gets
    what all evaluations so far computed, the one at hand last, with the keys that are decided. `noise` is `replay`'s.
    """
    every = (*marks, *(p for p in probes if p.name not in {m.name for m in marks}))
    sites = describe_sites(PlanSet(marks, (), ()))
    loop = SamplerLoop(table, inputs, latents, timestep_scale=timestep_scale, noise=noise)
    run = DynamicTrace()
    stored: dict[str, deque[Tensors]] = {}
    while loop.e < len(table.updates):
        decided: dict[str, bool] = {}
        actions, coefficients = list_actions(Decision(), every), ()
        graph, result = run_variant(component, every, actions, coefficients, stored, loop.inputs())
        for _ in range(online.rounds):
            signals = {name: t for name, t in result.items() if name != "sample"}
            decided |= online.decide(loop.e, table.timesteps[loop.e], signals)
            decision = decision_of([*run.decisions, decided])
            asked = (list_actions(decision, every), flatten_coefficients(decision, every))
            if asked != (actions, coefficients):
                actions, coefficients = asked
                graph, result = run_variant(component, every, actions, coefficients, stored, loop.inputs())
        stores = tuple(n for n in graph.stores if n in sites)
        store_sites(graph.model_copy(update={"stores": stores}), sites, stored, result)
        run.decisions.append(decided)
        run.outputs.append(result["sample"])
        loop.advance(result["sample"])
    return replace(run, latents=loop.latents)


def flatten_coefficients(decision: Decision, marks: Sequence[Mark]) -> tuple[float, ...]:
    """The coefficients of the sites that combine, in the order of the marks, as a plan has them."""
    return tuple(c for m in marks for c in decision.coefficients.get(m.name, ()))


def run_variant(component: Component, marks: tuple[Mark, ...], actions, coefficients, stored, call: dict[str, Tensor]):
    """One evaluation of one variant: its graph's description, and its outputs by name."""
    variant = eager_variant(component, PlanSet(marks, (), ()), Variant("now", actions))
    if variant.graph.combines:
        call |= {"coefficients": torch.tensor([coefficients]), **slot_inputs(variant.graph, stored)}
    return variant.graph, variant.call(call)
