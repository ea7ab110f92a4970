"""Plans: the sampler's table and a cache policy's decisions, joined evaluation by evaluation.

In: a pipeline's scheduler, the recipe, and the family's layout. Out: the sites to mark, the variants to compile, and one
`Plan` per number of steps (two when the recipe caches: `28` and `28-uncached`), each with its later starts where asked
for. Everything here is floats and names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...runtime.bounds import MAX_VALUES
from ...runtime.errors import ExportError
from ...runtime.manifest import size_graph_name
from ...runtime.plan import AreaSchedule, Evaluation, Plan, Tail, size_plan_name
from ..caches import Decision, Schedule, Trajectory, schedule
from ..sites.layout import Layout
from ..sites.marks import Mark, Variant
from .sampler import SchedulerTable


@dataclass(frozen=True)
class PlanSet:
    """The plans of an export: marks, distinct variants (the first is `full`) and the plans by name."""

    marks: tuple[Mark, ...]
    variants: tuple[Variant, ...]
    plans: tuple[Plan, ...]


TailTables = Mapping[int, SchedulerTable]  # steps left out -> the table of the loop that begins there


@dataclass(frozen=True)
class SizeSchedules:
    """The scheduler's tables at one size, and those of later starts, by number of steps."""

    tables: Mapping[int, SchedulerTable]
    tails: Mapping[int, TailTables]


def make_plans(
    cache: Any,
    layout: Layout,
    tables: Mapping[int, SchedulerTable],
    calibration: Any = None,
    *,
    tails: Mapping[int, TailTables] | None = None,
    further: Mapping[str, SizeSchedules] | None = None,
    areas: Mapping[int, SizeSchedules] | None = None,
) -> PlanSet:
    """Plans for every table. Raises ExportError for a cache that skips nothing at any of these step counts.

    `tails` has for a number of steps what `sampler.tabulate_tails` makes: the later starts of its plans. `further` are the tables
    of further sizes by name, `areas` those of the areas of a range, whose schedules lie in the default size's plans. What a cache
    decides by a calibration, or by the model's weights, it decides there evaluation by evaluation as at the default size.
    """
    sizes = {None: SizeSchedules(tables, tails or {}), **(further or {}), **(areas or {})}
    own = {
        n: schedule(cache, layout, Trajectory(t.timesteps, t.sigmas, t.steps), calibration) for n, t in tables.items()
    }
    schedules: dict[tuple[str | int | None, int], Schedule] = {(None, n): s for n, s in own.items()}
    for size, there in {**(further or {}), **(areas or {})}.items():
        for n, t in there.tables.items():
            follows = calibration is None and not cache.exact
            here = Trajectory(t.timesteps, t.sigmas, t.steps)
            schedules[size, n] = schedule(cache, layout, here, None) if follows else own[n]
    marks = next(iter(schedules.values())).marks
    if any(s.marks != marks for s in schedules.values()):
        raise ExportError(
            f"cache.method {cache.method!r} stores other values at {', '.join(map(str, tables))} steps each; export these numbers of "
            "sampler.steps one at a time"
        )
    names = name_variants(schedules.values(), marks)
    plans: dict[str, Plan] = {}
    schedules_by_area: dict[str, list[AreaSchedule]] = {}
    for (size, n), chosen in schedules.items():
        table, starts = sizes[size].tables[n], sizes[size].tails.get(n, {})
        everything = Schedule(marks, tuple(Decision() for _ in table.updates))
        made = {str(n): (cache.method, chosen)} | (
            {} if cache.method == "none" else {f"{n}-uncached": ("none", everything)}
        )
        for plain, (method, decided) in made.items():
            name = plain if isinstance(size, int) else size_plan_name(plain, size)
            graphs = names if isinstance(size, int) else {a: size_graph_name(v, size) for a, v in names.items()}
            plan = join_plan(name, n, method, table, decided, graphs, starts)
            if isinstance(size, int):
                schedules_by_area.setdefault(name, []).append(make_area_schedule(size, plan))
            else:
                plans[name] = plan
    whole = tuple(add_areas(plan, schedules_by_area.get(name, ())) for name, plan in plans.items())
    if cache.method != "none" and len(names) == 1:
        raise ExportError(
            f"cache.method {cache.method!r} skips nothing at {', '.join(map(str, tables))} steps; "
            "widen its range, take more steps, or set cache.method=none"
        )
    variants = tuple(Variant(name, actions) for actions, name in names.items())
    combined = {site for v in variants for site in v.sites_with("combine")}
    marks = tuple(m if m.name in combined else replace(m, stored_streams=()) for m in marks)
    return PlanSet(marks, variants, whole)


def make_area_schedule(area: int, plan: Plan) -> AreaSchedule:
    """What that plan, made at pictures of that area, is there."""
    return AreaSchedule(area=area, sigmas=plan.sigmas, evaluations=plan.evaluations, tails=plan.tails)


def add_areas(plan: Plan, schedules: Sequence[AreaSchedule]) -> Plan:
    """The plan with these. Raises ExportError where they are more than a reader takes."""
    if not schedules:
        return plan
    made = plan.model_copy(update={"areas": tuple(schedules)})
    if values := count_excess_values(made):
        raise ExportError(
            f"shapes: plan {plan.name!r} has a schedule for each of {len(schedules)} areas, {values} values in all, and a reader takes "
            f"{MAX_VALUES}; set a larger shapes.height.step and shapes.width.step"
        )
    return made


def count_excess_values(plan: Plan) -> int:
    """The values of the plan's file, if they are more than `MAX_VALUES`; else 0."""
    text = plan.model_dump_json(exclude_defaults=True)
    values = sum(map(text.count, ",[{"))
    return values if values > MAX_VALUES else 0


def list_actions(decision: Decision, marks: tuple[Mark, ...]):
    return tuple((m.name, decision.actions.get(m.name, "compute")) for m in marks)


def name_variants(schedules: Iterable[Schedule], marks: tuple[Mark, ...]) -> dict[Any, str]:
    """Distinct sets of actions -> name: `full` where all compute, then `reuse`, `reuse-2`, ... in order of first use."""
    names = {tuple((m.name, "compute") for m in marks): "full"}
    for s in schedules:
        for decision in s.decisions:
            n = len(names)
            names.setdefault(list_actions(decision, marks), "reuse" if n == 1 else f"reuse-{n}")
    return names


def join_plan(
    name: str,
    steps: int,
    cache: str,
    table: SchedulerTable,
    schedule: Schedule,
    names: dict[Any, str],
    tails: TailTables | None = None,
) -> Plan:
    """The plan of one table and one schedule, with a later start for each table in `tails`."""
    evaluations = list_evaluations(table, schedule.decisions, schedule.marks, names)
    return Plan(
        name=name,
        steps=steps,
        cache=cache,
        scheduler=table.scheduler,
        init_noise_sigma=table.init_noise_sigma,
        sigmas=table.sigmas,
        evaluations=evaluations,
        tails=tuple(build_tail(step, t, schedule, names, evaluations) for step, t in sorted((tails or {}).items())),
    )


def build_tail(
    step: int, table: SchedulerTable, schedule: Schedule, names: dict[Any, str], evaluations: tuple[Evaluation, ...]
) -> Tail:
    """A start at the table's first evaluation. The cache decides as in the whole plan, at the timesteps that it was
    calibrated at, but computes everything first: that fills every slot (`runtime/replay.py`) and needs no variant of its own."""
    begin = len(evaluations) - len(table.updates)
    decisions = (Decision(), *schedule.decisions[begin + 1 :])
    head = list_evaluations(table, decisions, schedule.marks, names)
    while head and head[-1] == evaluations[begin + len(head) - 1]:
        head = head[:-1]
    return Tail(step=step, begin=begin, head=head)


def list_evaluations(
    table: SchedulerTable, decisions: Sequence[Decision], marks: tuple[Mark, ...], names: dict[Any, str]
) -> tuple[Evaluation, ...]:
    """Row by row; coefficients follow the order of the marks."""
    return tuple(
        Evaluation(
            step=table.steps[e],
            variant=names[list_actions(decision, marks)],
            timestep=table.timesteps[e],
            input_scale=table.input_scales[e],
            coefficients=tuple(c for m in marks for c in decision.coefficients.get(m.name, ())),
            update=table.updates[e],
            marginal=table.marginals[e] if table.marginals else None,
        )
        for e, decision in enumerate(decisions)
    )


def drop_dead_tensors(marks: tuple[Mark, ...], dead: frozenset[str]) -> tuple[Mark, ...]:
    """The marks, no longer storing the tensors in `dead`, which no variant reads."""
    return tuple(
        replace(
            m,
            stored_streams=tuple(
                i for i in range(len(m.streams)) if m.tensor(i) in m.tensors and m.tensor(i) not in dead
            ),
        )
        for m in marks
    )
