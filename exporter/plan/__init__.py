"""Plans: the sampler's table and a cache policy's decisions, joined evaluation by evaluation.

In: a pipeline's scheduler, the recipe, and the family's layout. Out: the sites to mark, the variants to compile, and one
`Plan` per number of steps (two when the recipe caches: `28` and `28-uncached`). Everything here is floats and names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...runtime.errors import ExportError
from ...runtime.plan import Evaluation, Plan
from ..caches import Decision, Schedule, Trajectory, schedule
from ..layout import Layout
from ..marks import Mark, Variant
from .sampler import Table


@dataclass(frozen=True)
class Planned:
    """What the rest of an export needs: marks, distinct variants (the first is `full`) and the plans by name."""

    marks: tuple[Mark, ...]
    variants: tuple[Variant, ...]
    plans: tuple[Plan, ...]


def plan(cache: Any, layout: Layout, tables: dict[int, Table], calibration: Any = None) -> Planned:
    """Plans for every table. Raises ExportError for a cache that skips nothing at any of these step counts."""
    schedules = {
        n: schedule(cache, layout, Trajectory(t.timesteps, t.sigmas, t.steps), calibration) for n, t in tables.items()
    }
    marks = next(iter(schedules.values())).marks
    if any(s.marks != marks for s in schedules.values()):
        raise ExportError(
            f"cache.method {cache.method!r} stores other values at {', '.join(map(str, tables))} steps each; export these numbers of "
            "sampler.steps one at a time"
        )
    names = variant_names(schedules, marks)
    plans = []
    for n, table in tables.items():
        plans.append(join(str(n), n, cache.method, table, schedules[n], names))
        if cache.method != "none":
            everything = Schedule(marks, tuple(Decision() for _ in table.updates))
            plans.append(join(f"{n}-uncached", n, "none", table, everything, names))
    if cache.method != "none" and len(names) == 1:
        raise ExportError(
            f"cache.method {cache.method!r} skips nothing at {', '.join(map(str, tables))} steps; "
            "widen its range, take more steps, or set cache.method=none"
        )
    variants = tuple(Variant(name, actions) for actions, name in names.items())
    combined = {site for v in variants for site in v.having("combine")}
    marks = tuple(m if m.name in combined else replace(m, kept=()) for m in marks)
    return Planned(marks, variants, tuple(plans))


def actions_of(decision: Decision, marks: tuple[Mark, ...]):
    return tuple((m.name, decision.actions.get(m.name, "compute")) for m in marks)


def variant_names(schedules: dict[int, Schedule], marks: tuple[Mark, ...]) -> dict[Any, str]:
    """Distinct sets of actions -> name: `full` where all compute, then `reuse`, `reuse-2`, ... in order of first use."""
    names = {tuple((m.name, "compute") for m in marks): "full"}
    for s in schedules.values():
        for decision in s.decisions:
            n = len(names)
            names.setdefault(actions_of(decision, marks), "reuse" if n == 1 else f"reuse-{n}")
    return names


def join(name: str, steps: int, cache: str, table: Table, schedule: Schedule, names: dict[Any, str]) -> Plan:
    """The plan of one table and one schedule; coefficients follow the order of the marks."""
    evaluations = tuple(
        Evaluation(
            step=table.steps[e],
            variant=names[actions_of(decision, schedule.marks)],
            timestep=table.timesteps[e],
            input_scale=table.input_scales[e],
            coefficients=tuple(c for m in schedule.marks for c in decision.coefficients.get(m.name, ())),
            update=table.updates[e],
        )
        for e, decision in enumerate(schedule.decisions)
    )
    return Plan(
        name=name,
        steps=steps,
        cache=cache,
        scheduler=table.scheduler,
        init_noise_sigma=table.init_noise_sigma,
        sigmas=table.sigmas,
        evaluations=evaluations,
    )


def without_dead(marks: tuple[Mark, ...], dead: frozenset[str]) -> tuple[Mark, ...]:
    """The marks, no longer storing the tensors in `dead`, which no variant reads."""
    return tuple(
        replace(m, kept=tuple(i for i in range(len(m.streams)) if m.tensor(i) in m.tensors and m.tensor(i) not in dead))
        for m in marks
    )
