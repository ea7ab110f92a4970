"""Rebuild: the plans of an artifact that exists, made once more from its recipe, its `replan.json` and a scheduler.

`prebake plan` adds what comes out, and a verification compares it with what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.errors import ExportError
from ...runtime.manifest import ATTACH_FAMILY, Manifest, size_graph_name
from ...runtime.plan import Plan, size_plan_name
from ..caches import Decision, Schedule, Trajectory, schedule
from ..caches.common import calibration as calibrations
from ..caches.common.calibration import Calibration
from ..caches.common.fallback import settle_cache
from ..families.registry import load_family
from ..plan import add_areas, join_plan, list_actions, make_area_schedule
from ..plan.areas import tabulate_areas
from ..plan.inputs import PlanInputs, read_plan_inputs
from ..plan.sampler import SchedulerTable, tabulate_scheduler, tabulate_tails
from ..progress import Progress
from ..recipe.resolve import Recipe
from ..settle import build_scheduler
from ..sites.marks import Action, Mark


def build_plans(
    folder: Path, manifest: Manifest, recipe: Recipe, steps: int, progress: Progress, content: PlanInputs | None = None
) -> tuple[tuple[Plan, ...], Calibration | None]:
    """The plan for `steps` with the recipe's scheduler and cache, and with a cache the one without it, for each of the artifact's
    sizes, as an export has them, and the calibration that they rest on. `content` stands in for the artifact's `replan.json`. With a note, `cache.otherwise` stands in for a plan found for other steps.

    Raises ExportError where the artifact lacks a variant that it needs, or has another calibration.
    """
    if manifest.family == ATTACH_FAMILY:
        raise ExportError(
            f"{folder}: holds a denoiser alone, whose plans follow its pipeline's own schedule; export again with sampler.steps"
        )
    content = content or read_plan_inputs(folder, manifest)
    usual = manifest.pipeline["latents_shape"]
    shapes = {size.name: size.pipeline.get("latents_shape", usual) for size in manifest.sizes}
    sizes = {name: sampler_tables(content, manifest, recipe, steps, s) for name, s in {None: usual, **shapes}.items()}
    areas = area_tables(content, manifest, recipe, steps)
    table, _ = sizes[None]
    cache, calibration = settle_cache(
        recipe.cache, manifest.source, manifest.defaults, {steps: table}, folder, progress
    )
    marks = content.marks
    names = {v.actions: v.name for v in content.all_variants()}
    everything = Schedule(marks, tuple(Decision() for _ in table.updates))

    def join_sizes(name: str, method: str, schedules: Callable[[SchedulerTable], Schedule]) -> tuple[Plan, ...]:
        """That plan at each size."""
        made = []
        for size, (of_size, tails) in sizes.items():
            graphs = {actions: size_graph_name(variant, size) for actions, variant in names.items()}
            named = size_plan_name(name, size)
            made.append(join_plan(named, steps, method, of_size, schedules(of_size), graphs, tails))
        by_area = [
            make_area_schedule(area, join_plan(name, steps, method, of_area, schedules(of_area), names, tails))
            for area, (of_area, tails) in areas.items()
        ]
        return (add_areas(made[0], by_area), *made[1:])

    if cache.method == "none":
        return join_sizes(str(steps), "none", lambda _: everything), None
    if cache.exact:
        raise ExportError(
            f"cache.method {cache.method!r} with signal = {cache.signal!r} decides by the model's weights, which `prebake plan` does "
            "not read; set cache.signal=modulated and name a calibration, or export again with sampler.steps"
        )
    if calibration:
        refuse_other_calibration(calibration, cache.calibration, folder)

    def decide(of_size: SchedulerTable) -> Schedule:
        """The cache's decisions by a size's timesteps; those of a calibration are the default size's at every size."""
        at = table if calibration else of_size
        asked = schedule(cache, content.layout, Trajectory(at.timesteps, at.sigmas, at.steps), calibration)
        if all(action == "compute" for d in asked.decisions for action in d.actions.values()):
            raise ExportError(
                f"cache.method {cache.method!r} skips nothing at {steps} steps; widen its range, take more steps, or add --cache none"
            )
        translated = rename_sites(marks, asked)
        refuse_uncompiled_actions(content, translated, names)
        return translated

    cached = join_sizes(str(steps), cache.method, decide)
    uncached = join_sizes(f"{steps}-uncached", "none", lambda _: everything)
    return (*cached, *uncached), calibration


def refuse_other_calibration(calibration: Calibration, name: str, folder: Path) -> None:
    """Raises ExportError where the artifact carries another calibration than the one that the cache calls `name`."""
    own = folder / calibrations.CALIBRATION_FILE
    if own.exists() and calibrations.read_calibration(own) != calibration:
        raise ExportError(
            f"cache.calibration {name!r} is not the calibration that the artifact carries, which its plans rest on; set "
            f"cache.calibration={calibrations.CALIBRATION_FILE}, or export again with this one"
        )


def area_tables(
    content: PlanInputs, manifest: Manifest, recipe: Recipe, steps: int
) -> dict[int, tuple[SchedulerTable, Mapping[int, SchedulerTable]]]:
    """The tables at each area of the artifact's range but the default size's; none where they do not follow the size."""
    legal = manifest.range

    def tabulate(height: int, width: int) -> tuple[SchedulerTable, Mapping[int, SchedulerTable]]:
        assert legal is not None
        return sampler_tables(content, manifest, recipe, steps, legal.latents_at(height, width))

    return tabulate_areas(legal, manifest.defaults.height * manifest.defaults.width, tabulate)


def sampler_tables(
    content: PlanInputs, manifest: Manifest, recipe: Recipe, steps: int, shape: Sequence[int]
) -> tuple[SchedulerTable, Mapping[int, SchedulerTable]]:
    """The scheduler's table at the size whose latents have that shape, from the configuration that the artifact keeps, and those of its
    later starts."""
    name = recipe.sampler.scheduler
    scheduler = build_scheduler(content.scheduler if name == "model" else name, content.scheduler_config)
    arguments = load_family(manifest.family).scheduler_arguments(scheduler, shape, steps)
    tails = tabulate_tails(scheduler, steps, **arguments) if recipe.sampler.image_to_image else {}
    return tabulate_scheduler(scheduler, steps, **arguments), tails


def rename_sites(marks: Sequence[Mark], asked: Schedule) -> Schedule:
    """The schedule with the artifact's sites in place of equal ones under other names, and a zero for each slot more
    that the artifact keeps. Sites that it lacks stay, for `refuse_uncompiled_actions` to name."""
    there = {site_identity(m): m for m in marks}
    same = {m.name: there[site_identity(m)] for m in asked.marks if site_identity(m) in there}
    more = tuple(m for m in asked.marks if m.name not in same)
    decisions = []
    for d in asked.decisions:
        actions: dict[str, Action] = {same[s].name if s in same else s: a for s, a in d.actions.items()}
        weights = {same[s].name: pad_coefficients(same[s], c) for s, c in d.coefficients.items() if s in same}
        decisions.append(Decision(actions, weights))
    return Schedule((*marks, *more), tuple(decisions))


def site_identity(mark: Mark) -> tuple[Any, ...]:
    """What makes two marks the same site: all but the name, and how much of it is kept."""
    return mark.modules, mark.streams, mark.residual, mark.emitted, mark.dtype, mark.part


def pad_coefficients(mark: Mark, weights: tuple[float, ...]) -> tuple[float, ...]:
    if len(weights) > mark.slots:
        raise ExportError(
            f"site {mark.name!r}: the cache combines {len(weights)} stored values, the artifact's variants have room for "
            f"{mark.slots}; lower the order, or export again"
        )
    return weights + (0.0,) * (mark.slots - len(weights))


def refuse_uncompiled_actions(content: PlanInputs, asked: Schedule, names: dict[Any, str]) -> None:
    """Raises ExportError with the actions that no compiled variant has, and with the variants that exist."""
    marks = content.marks
    lacking: dict[str, list[int]] = {}
    for e, decision in enumerate(asked.decisions):
        acting: dict[str, Action] = {site: a for site, a in decision.actions.items() if a != "compute"}
        if acting.keys() - {m.name for m in marks} or list_actions(decision, marks) not in names:
            lacking.setdefault(actions_text(acting), []).append(e)
    if lacking:
        needs = "; ".join(f"{what} (evaluations {', '.join(map(str, at))})" for what, at in lacking.items())
        have = "; ".join(
            f"{v.name} = {actions_text({s: a for s, a in v.actions if a != 'compute'})}" for v in content.all_variants()
        )
        raise ExportError(
            f"no compiled variant does what this cache asks for: {needs}. The artifact has: {have}. "
            "Choose a cache that does with these, or export again"
        )


def actions_text(actions: dict[str, Action]) -> str:
    """`combine a, b, c and 4 more`, for each kind of action."""
    kinds = {a: [s for s, action in actions.items() if action == a] for a in dict.fromkeys(actions.values())}
    shown = (f"{a} {', '.join(s[:3])}{f' and {len(s) - 3} more' if len(s) > 3 else ''}" for a, s in kinds.items())
    return ", ".join(shown) or "compute all"
