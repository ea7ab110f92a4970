"""Side by side with other people's caches: the peer's own hooks in eager, and our plan, over the same loop and inputs.

The peer's model is an ordinary denoiser whose hooks the test has put on; `peer_replay` drives it through an uncached plan
with the runtime's own loop, so that every evaluation's output can be compared, and not the last latents alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prebake.exporter.caches import NoCache
from prebake.exporter.calibrators.eager_replay import eager_replay
from prebake.exporter.plan import PlanSet, make_plans
from prebake.exporter.plan.sampler import SchedulerTable, tabulate_scheduler
from prebake.exporter.sites.component import Component
from prebake.exporter.sites.guidance import GuidedDenoiser
from prebake.exporter.sites.layout import Layout
from prebake.runtime.plan import Plan
from support.known_layouts import layout_of


@dataclass
class Run:
    """What one replay gave: each evaluation's output, the final latents, and (of a peer) the sites that really ran."""

    outputs: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None
    ran: list[set[str]] = field(default_factory=list)

    def error(self, other: Run) -> float:
        """The largest difference of any evaluation's output, relative to the largest output."""
        pairs = list(zip(self.outputs, other.outputs, strict=True))
        return float(max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs))


class Watch:
    """Records which modules' own forwards run, evaluation by evaluation. Made before the peer's hooks are put on."""

    def __init__(self, component: Component, layout: Layout) -> None:
        self.ran: list[set[str]] = []
        for place in layout.places:
            self.wrap(component.module.get_submodule(place.path), place.site)

    def wrap(self, module: nn.Module, site: str) -> None:
        forward = module.forward

        def watched(*args, **kwargs):
            self.ran[-1].add(site)
            return forward(*args, **kwargs)

        watched.__signature__ = inspect.signature(forward)
        module.forward = watched


def table_of(scheduler: Any, steps: int, **kwargs: Any) -> SchedulerTable:
    return tabulate_scheduler(scheduler, steps, **kwargs)


def ours(
    component: Component,
    planned: PlanSet,
    chosen: Plan,
    latents: Tensor,
    *,
    timestep_scale: float = 1.0,
    inputs: dict[str, Tensor] | None = None,
    noise: tuple[Tensor, ...] = (),
) -> Run:
    """The plan, replayed in eager."""
    run = Run()

    def keep(e: int, output: Tensor, _: Tensor) -> None:
        run.outputs.append(output)

    given = inputs or inputs_of(component)
    run.latents = eager_replay(
        component, planned, chosen, given, latents, timestep_scale=timestep_scale, on_evaluation=keep, noise=noise
    )
    return run


def peer_replay(
    component: Component,
    table: SchedulerTable,
    latents: Tensor,
    apply: Callable[[nn.Module, Clock], None],
    *,
    timestep_scale: float = 1.0,
    inputs: dict[str, Tensor] | None = None,
    call: Callable[[nn.Module, Clock], Any] | None = None,
) -> Run:
    """The trajectory of `table` over a private copy of the component's model on which `apply(model, clock)` put its hooks.

    A guided component runs as diffusers' pipelines run it: one call of batch 2, the unconditional half first; hooks go on
    that one model. `call(model, clock)` may give a context manager to make each evaluation in (diffusers' `cache_context`).
    """
    batched = Batched(component) if isinstance(component.module, GuidedDenoiser) else None
    module = batched if batched else copy.deepcopy(component.module)
    prefix = "one." + component.branches["cond"].removeprefix("cond.") if batched else component.branches[""]
    alone = Component(component.name, module, component.inputs, component.outputs, component.args, {"": prefix})
    layout, clock = layout_of(alone), Clock(table)
    watch = Watch(alone, layout)
    model = module.get_submodule(prefix.removesuffix("."))
    apply(model, clock)
    uncached = make_plans(NoCache(), layout, {len(set(table.steps)): table})
    run = Run()

    class Evaluated(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            watch.ran.append(set())
            if call is None:
                return module(*tensors)
            with call(model, clock):
                return module(*tensors)

    driven = Component(component.name, Evaluated(), component.inputs, component.outputs, component.args, {"": ""})

    def keep(e: int, output: Tensor, _: Tensor) -> None:
        run.outputs.append(output)
        clock.e = e + 1

    given = inputs or inputs_of(component)
    run.latents = eager_replay(
        driven, uncached, uncached.plans[0], given, latents, timestep_scale=timestep_scale, on_evaluation=keep
    )
    run.ran = watch.ran
    return run


class Clock:
    """The evaluation that a peer is in; call it for the scheduler's timestep, as a `current_timestep_callback`."""

    def __init__(self, table: SchedulerTable) -> None:
        self.table, self.e = table, 0

    def __call__(self) -> float:
        return self.table.timesteps[self.e]


class Batched(nn.Module):
    """Guidance as diffusers' pipelines do it: one call with the unconditional half first."""

    def __init__(self, component: Component) -> None:
        super().__init__()
        self.one = copy.deepcopy(component.module.cond)
        self.inputs, self.doubled = component.module.inputs, component.module.doubled

    def forward(self, *tensors: Tensor) -> Tensor:
        *own, guidance = tensors
        both = [
            t[0] if n in self.doubled else t.repeat(2, *[1] * (t.dim() - 1))
            for n, t in zip(self.inputs, own, strict=True)
        ]
        uncond, cond = self.one(*both).chunk(2)
        return uncond + guidance * (cond - uncond)


def inputs_of(component: Component) -> dict[str, Tensor]:
    """The component's example inputs but latents and timestep: what stays the same over the steps."""
    named = zip(component.inputs, component.args, strict=True)
    return {n: t for n, t in named if n not in ("hidden_states", "timestep")}


def computed(schedule_or_decisions: Any, places: set[str] | None = None) -> list[set[str]]:
    """The marked sites that each decision computes."""
    marks, decisions = schedule_or_decisions.marks, schedule_or_decisions.decisions
    return [{m.name for m in marks if d.actions.get(m.name, "compute") == "compute"} for d in decisions]
