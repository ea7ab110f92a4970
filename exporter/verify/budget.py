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
GATED_SHARE = 0.75  # of the evaluations, for those that compute everything
CACHED_EVALUATIONS = 2  # that a cached one costs eager: in full, and as the same variant
STORED_EVALUATIONS = 4  # of a plan, at most, whose stored values are kept so that eager can run the same variant
LOSS_EVALUATIONS = 4  # at which the loss of bfloat16 is measured, between which it is interpolated


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
    """Seconds on this machine: of each variant's evaluation, of eager's, of what runs once for a picture (encoders and
    decoder) with the artifact and in eager, and of an evaluation in eager bfloat16."""

    variants: Mapping[str, float]
    evaluation: float
    once: float = 0.0
    eager_once: float = 0.0
    bfloat16: float = 0.0

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

    def picture_row(self, plans: Collection[Plan]) -> float:
        """The same, and the picture in eager bfloat16."""
        rounded = {p.steps: self.eager_once + self.bfloat16 * len(p.evaluations) for p in plans}
        return self.row(plans) + sum(rounded.values())

    def force(self, plans: Mapping[str, Plan], gated: Collection[str], forced: Mapping[str, Collection[int]]) -> float:
        """The evaluations of one picture that eager repeats: `forced`, by plan."""
        whole = [plans[name].evaluations[e].variant in gated for name, chosen in forced.items() for e in chosen]
        return self.evaluation * sum(1 if w else CACHED_EVALUATIONS for w in whole)


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
    `steps` of each plan. At those in `scaled`, of the first such job, eager bfloat16 runs as well; of those in `stored` what they read from
    sites is kept. `seconds` are predicted; `asked` is what a comparison without a budget counts."""

    jobs: tuple[PictureJob, ...]
    checked: int
    forced: Mapping[str, tuple[int, ...]]
    forced_jobs: int
    seconds: float
    asked: WorkCount
    traced: PictureJob | None = None
    steps: Mapping[str, int] = field(default_factory=dict)
    scaled: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

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
    row, picture_row = costs.row(plans.values()), costs.picture_row(plans.values())
    forcing = costs.force(plans, gated, everything)
    warm_up = (bool(jobs) + bool(checked)) * row
    scaled = choose_scaled(plans, gated, everything, max(map(len, everything.values()), default=0)) if seeded else {}
    loss = sum(map(len, scaled.values())) * costs.bfloat16
    seconds = warm_up + len(jobs) * picture_row + checked * row + seeded * forcing + loss
    if budget is None or seconds <= budget:
        stored = choose_stored(plans, gated, everything)
        return Workload(
            tuple(jobs), checked, everything, seeded, seconds, asked, scaled=scaled, stored=stored if seeded else {}
        )
    loss = LOSS_EVALUATIONS * costs.bfloat16 * bool(seeded)
    budget -= loss
    reserve = min(FORCED_EVALUATIONS, sum(map(len, everything.values()))) * costs.evaluation * bool(seeded)
    if jobs and reserve + picture_row > budget:
        return trace_alone(budget, loss, costs, plans, gated, jobs[0], asked)
    pictures = min(len(jobs), max(1, int((budget - reserve) / picture_row / (2 if checked else 1)))) if jobs else 0
    drawn = min(checked, max(0 if jobs else 1, int((budget - reserve - pictures * picture_row) / row)))
    pictures = max(pictures, min(len(jobs), int((budget - reserve - drawn * row) / picture_row)))
    spent = pictures * picture_row + drawn * row
    forced = spread_evaluations(plans, gated, count_forced(budget - spent, costs, plans, gated) if seeded else 0)
    return Workload(
        tuple(jobs[:pictures]),
        drawn,
        forced,
        min(1, seeded),
        spent + costs.force(plans, gated, forced) + loss,
        asked,
        scaled=choose_scaled(plans, gated, forced, LOSS_EVALUATIONS),
        stored=choose_stored(plans, gated, forced),
    )


def count_forced(seconds: float, costs: Costs, plans: Mapping[str, Plan], gated: Collection[str]) -> int:
    """How many evaluations eager repeats in that time, if `GATED_SHARE` of them are of `gated` variants where others are too."""
    others = any(e.variant not in gated for plan in plans.values() for e in plan.evaluations)
    each = GATED_SHARE + (1 - GATED_SHARE) * CACHED_EVALUATIONS if others else 1.0
    return int(seconds / (each * costs.evaluation))


def choose_scaled(
    plans: Mapping[str, Plan], gated: Collection[str], forced: Mapping[str, Sequence[int]], count: int
) -> dict[str, tuple[int, ...]]:
    """At which of the `forced` evaluations eager bfloat16 runs too: `count` that compute everything, evenly spread. Of plans of as many
    steps, which share their timesteps, one stands for all."""
    whole = {
        name: [e for e in chosen if plans[name].evaluations[e].variant in gated] for name, chosen in forced.items()
    }
    of_steps: dict[tuple[int, str | None], str] = {}
    for name, chosen in whole.items():
        key = (plans[name].steps, plans[name].size)
        if key not in of_steps or len(chosen) > len(whole[of_steps[key]]):
            of_steps[key] = name
    return {name: spread(whole[name], max(1, count // len(of_steps))) for name in of_steps.values()}


def choose_stored(
    plans: Mapping[str, Plan], gated: Collection[str], forced: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Of which of the `forced` evaluations stored values are kept."""
    cached = {
        name: [e for e in chosen if plans[name].evaluations[e].variant not in gated] for name, chosen in forced.items()
    }
    return {name: spread(chosen, STORED_EVALUATIONS) for name, chosen in cached.items() if chosen}


def trace_alone(
    budget: float,
    loss: float,
    costs: Costs,
    plans: Mapping[str, Plan],
    gated: Collection[str],
    job: PictureJob,
    asked: WorkCount,
) -> Workload:
    """What to do with less time than one picture of eager's takes: the artifact draws, eager only judges evaluations, two of
    each plan at least. `budget` is what is left besides the `loss` of bfloat16."""
    opening = {name: count_opening_steps(plan) for name, plan in plans.items()}
    least = costs.force(plans, gated, spread_evaluations(plans, gated, 2 * len(plans), opening))
    share = min(TRACED_SHARE * budget, budget - least) / sum(map(costs.draw, plans.values()))
    steps = {name: min(plan.steps, max(opening[name], math.floor(share * plan.steps))) for name, plan in plans.items()}
    if costs.draw_all(plans, steps) + least > budget:
        steps = opening
    drawn = costs.draw_all(plans, steps)
    count = max(2 * len(plans), count_forced(budget - drawn, costs, plans, gated))
    forced = spread_evaluations(plans, gated, count, steps)
    return Workload(
        (),
        0,
        forced,
        0,
        drawn + costs.force(plans, gated, forced) + loss,
        asked,
        job,
        steps,
        choose_scaled(plans, gated, forced, LOSS_EVALUATIONS),
        choose_stored(plans, gated, forced),
    )


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
