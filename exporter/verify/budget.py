"""The budget of a verification: what a comparison draws within the time that the recipe gives it.

What things cost on this machine comes in (`Costs`), and a `Workload` comes out. Where there is time for everything,
everything is drawn. Where there is not, evaluations that are held against eager's at equal inputs come first: they judge a
model of any size, for seconds each. Pictures that eager draws as well come next, and checked prompts get what is left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ...runtime.plan import Plan

PictureJob = tuple[str, int]
"""A prompt and the seed of its noise."""
WHOLE_EVALUATIONS = 8  # a plan of no more is always drawn whole
OPENING_EVALUATIONS = 4  # of a longer plan, at least
FORCED_EVALUATIONS = 16  # that time is kept for, before pictures are drawn
TRACED_SHARE = 0.5  # of a budget that no picture of eager's fits into, for the artifact's own steps
GATED_SHARE = 0.75  # of the evaluations, for those that compute everything, which have a threshold


def count_opening_steps(plan: Plan) -> int:
    """How many of the plan's first steps show what it does: until each of its variants has run, and no fewer than
    `OPENING_EVALUATIONS`; all of a short plan."""
    if len(plan.evaluations) <= WHOLE_EVALUATIONS:
        return plan.steps
    variants = [e.variant for e in plan.evaluations]
    last = max(OPENING_EVALUATIONS - 1, *(variants.index(name) for name in set(variants)))
    return plan.evaluations[last].step + 1


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine: of each variant's evaluation, of eager's, and of what runs once for a picture (encoders and
    decoder) with the artifact and in eager."""

    variants: Mapping[str, float]
    evaluation: float
    once: float = 0.0
    eager_once: float = 0.0

    def draw(self, plan: Plan, steps: int | None = None) -> float:
        """The artifact's picture by that plan, or its first steps alone."""
        return self.once + sum(self.variants[e.variant] for e in plan.evaluations if steps is None or e.step < steps)

    def draw_all(self, plans: Mapping[str, Plan], steps: Mapping[str, int]) -> float:
        """The first steps of a picture by each plan."""
        return sum(self.draw(plan, steps[name]) for name, plan in plans.items())

    def row(self, plans: Collection[Plan]) -> float:
        """One prompt and seed, drawn with every plan, and in eager with as many steps."""
        eager = {p.steps: self.eager_once + self.evaluation * len(p.evaluations) for p in plans}
        return sum(map(self.draw, plans)) + sum(eager.values())


@dataclass(frozen=True)
class WorkCount:
    """How much there is to compare: pictures that eager draws as well, evaluations that it repeats, and checked prompts."""

    pictures: int
    evaluations: int
    checked: int


@dataclass(frozen=True)
class Workload:
    """What a comparison draws. `jobs` are drawn in eager too; of the first `forced_jobs` with seed 0 the evaluations in
    `forced`, by plan, are held against eager's. Where there are no jobs, `traced` is drawn by the artifact alone, for
    `steps` of each plan. `seconds` are predicted; `asked` is what a comparison without a budget counts."""

    jobs: tuple[PictureJob, ...]
    checked: int
    forced: Mapping[str, tuple[int, ...]]
    forced_jobs: int
    seconds: float
    asked: WorkCount
    traced: PictureJob | None = None
    steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def count(self) -> WorkCount:
        """What it draws."""
        forced = sum(map(len, self.forced.values())) * (self.forced_jobs + bool(self.traced))
        return WorkCount(len(self.jobs), forced, self.checked)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out for want of time."""
        return self.count == self.asked

    def describe(self) -> str:
        """What is drawn, and about how long it takes."""
        count, asked = self.count, self.asked
        parts = [
            f"{count.pictures} of {asked.pictures} pictures",
            f"{count.evaluations} of {asked.evaluations} evaluations",
            *([f"{count.checked} of {asked.checked} checked prompts"] if asked.checked else []),
        ]
        return f"{', '.join(parts)}, about {format_seconds(self.seconds)}"


def choose_workload(
    budget: float | None,
    costs: Costs,
    plans: Mapping[str, Plan],
    gated: Collection[str],
    jobs: Sequence[PictureJob],
    checked: int,
) -> Workload:
    """What to draw of `jobs` and as many checked prompts, in `budget` seconds (None: however long all of it takes). `gated` are the
    variants that compute everything."""
    everything = {name: tuple(range(len(plan.evaluations))) for name, plan in plans.items()}
    seeded = sum(seed == 0 for _, seed in jobs)
    asked = WorkCount(len(jobs), seeded * sum(map(len, everything.values())), checked)
    row = costs.row(plans.values())
    warm_up = (bool(jobs) + bool(checked)) * row
    seconds = warm_up + (len(jobs) + checked) * row + asked.evaluations * costs.evaluation
    if budget is None or seconds <= budget:
        return Workload(tuple(jobs), checked, everything, seeded, seconds, asked)
    reserve = min(FORCED_EVALUATIONS, sum(map(len, everything.values()))) * costs.evaluation * bool(seeded)
    rows = max(0, int((budget - reserve) / row))
    if not rows and jobs:
        return trace_alone(budget, costs, plans, gated, jobs[0], asked)
    rows = max(1, rows)
    pictures = min(len(jobs), max(1, rows // 2) if checked else rows)
    drawn = min(checked, rows - pictures)
    pictures = min(len(jobs), rows - drawn)
    spent = (pictures + drawn) * row
    forced = spread_evaluations(plans, gated, int((budget - spent) / costs.evaluation) if seeded else 0)
    spent += sum(map(len, forced.values())) * costs.evaluation
    return Workload(tuple(jobs[:pictures]), drawn, forced, min(1, seeded), spent, asked)


def trace_alone(
    budget: float,
    costs: Costs,
    plans: Mapping[str, Plan],
    gated: Collection[str],
    job: PictureJob,
    asked: WorkCount,
) -> Workload:
    """What to do with less time than one picture of eager's takes: the artifact draws, eager only judges evaluations, two of
    each plan at least."""
    least = 2 * len(plans) * costs.evaluation
    share = min(TRACED_SHARE * budget, budget - least) / sum(map(costs.draw, plans.values()))
    opening = {name: count_opening_steps(plan) for name, plan in plans.items()}
    steps = {name: min(plan.steps, max(opening[name], math.floor(share * plan.steps))) for name, plan in plans.items()}
    if costs.draw_all(plans, steps) + least > budget:
        steps = opening
    drawn = costs.draw_all(plans, steps)
    count = max(2 * len(plans), int((budget - drawn) / costs.evaluation))
    forced = spread_evaluations(plans, gated, count, steps)
    seconds = drawn + sum(map(len, forced.values())) * costs.evaluation
    return Workload((), 0, forced, 0, seconds, asked, job, steps)


def spread_evaluations(
    plans: Mapping[str, Plan], gated: Collection[str], count: int, steps: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """About `count` evaluations of the plans' first `steps`, evenly spaced, first and last among them; most of them are of
    `gated` variants."""
    found = {}
    for name, plan in plans.items():
        share = count // len(plans)
        there = [e for e, v in enumerate(plan.evaluations) if steps is None or v.step < steps[name]]
        whole = [e for e in there if plan.evaluations[e].variant in gated]
        others = [e for e in there if plan.evaluations[e].variant not in gated]
        of_whole = min(len(whole), math.ceil(GATED_SHARE * share) if others else share)
        of_others = min(len(others), share - of_whole)
        found[name] = tuple(sorted((*spread(whole, of_whole), *spread(others, of_others))))
    return found


def spread(values: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the values, evenly spaced, first and last among them; the last alone for one."""
    if count >= len(values):
        return tuple(values)
    if count <= 1:
        return tuple(values[len(values) - count :])
    return tuple(values[i * (len(values) - 1) // (count - 1)] for i in range(count))


def format_seconds(seconds: float) -> str:
    """`40 s`, `9 min` or `2.5 h`."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
