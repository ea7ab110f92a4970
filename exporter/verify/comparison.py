"""Comparison: an artifact and the eager pipeline draw the same prompts and seeds, and figures say how far apart they are.

In: what draws with the artifact, the eager reference, and the `Workload` that the budget allows. Out: a `Comparison` with one `Sample` of
figures for each picture and plan, and the worst rows of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...runtime.plan import Plan
from ..progress import Progress
from .budget import Costs, PictureJob, Workload, count_opening_steps
from .checked_prompts import CheckedPrompts
from .closeness import psnr_db, relative_error, smallest_psnr_db, ssim
from .reference import EagerReference
from .replayer import ArtifactReplayer, DrawnPicture, GraphCall, image_array

REPORT_ROWS = 6  # that a report shows


@dataclass(frozen=True)
class PictureRow:
    """One prompt and seed: drawn in eager at each number of steps, and by the artifact with each plan."""

    prompt: str
    seed: int
    eager: Mapping[int, DrawnPicture]
    plans: Mapping[str, DrawnPicture]

    def drop_calls(self) -> PictureRow:
        """A copy of the row without the graphs' calls, whose tensors are large."""
        return replace(self, plans={name: replace(drawn, calls=()) for name, drawn in self.plans.items()})


@dataclass(frozen=True)
class Sample:
    """One picture of one plan against the eager one of the same prompt, seed and number of steps.

    `evaluation_errors` are teacher-forced: eager at the artifact's own inputs of that evaluation, None of one that was left out;
    `eager_ms` are the times of those calls. Both are empty where that was not asked for.
    """

    plan: str
    psnr_db: float
    ssim: float
    latents_relative_error: float
    evaluation_errors: tuple[float | None, ...]
    eager_ms: tuple[float, ...]
    variant_ms: tuple[tuple[str, float], ...]
    seconds: float
    eager_seconds: float


@dataclass(frozen=True)
class Trace:
    """The first evaluations of one plan that the artifact drew alone; as in `Sample`, None was not held against eager."""

    plan: str
    evaluation_errors: tuple[float | None, ...]
    eager_ms: tuple[float, ...]
    variant_ms: tuple[tuple[str, float], ...]


def draw_rows(
    replayer: ArtifactReplayer, reference: EagerReference, jobs: Sequence[PictureJob], *, warm_up: bool
) -> Iterator[PictureRow]:
    """Draws every job; eager and plans take turns, so that what slows this machine down slows all of them down.

    With `warm_up` the first job is drawn once more before, unseen: the first call of anything is slow.
    """
    plans = replayer.artifact.plans
    for prompt, seed in jobs[: int(warm_up)]:
        reference.draw(prompt, seed, min(p.steps for p in plans.values()))
        for plan in plans.values():
            replayer.draw(prompt, seed, plan)
    for prompt, seed in jobs:
        eager = {steps: reference.draw(prompt, seed, steps) for steps in sorted({p.steps for p in plans.values()})}
        yield PictureRow(prompt, seed, eager, {name: replayer.draw(prompt, seed, p) for name, p in plans.items()})


def compare_row(
    replayer: ArtifactReplayer, reference: EagerReference, row: PictureRow, forced: Mapping[str, Collection[int]]
) -> tuple[Sample, ...]:
    """The figures of a row, plan by plan, with the errors of the evaluations in `forced`, by plan."""
    samples = []
    for name, drawn in row.plans.items():
        eager = row.eager[replayer.artifact.plans[name].steps]
        calls = replayer.evaluations(drawn)
        errors, eager_ms = compare_evaluations(reference, calls, forced.get(name, ()))
        samples.append(
            Sample(
                plan=name,
                psnr_db=psnr_db(drawn.image, eager.image),
                ssim=ssim(drawn.image, eager.image),
                latents_relative_error=relative_error(drawn.latents, eager.latents),
                evaluation_errors=errors,
                eager_ms=eager_ms,
                variant_ms=tuple((c.graph, c.ms) for c in calls),
                seconds=drawn.seconds,
                eager_seconds=eager.seconds,
            )
        )
    return tuple(samples)


def compare_evaluations(
    reference: EagerReference, calls: Sequence[GraphCall], forced: Collection[int]
) -> tuple[tuple[float | None, ...], tuple[float, ...]]:
    """Teacher-forced errors of the calls, None of those that are not in `forced`, and eager's milliseconds for the others.
    Nothing at all where none is."""
    errors: list[float | None] = []
    eager_ms = []
    for e, call in enumerate(calls if forced else ()):
        if e in forced:
            theirs, ms = reference.evaluate(call)
            errors.append(relative_error(call.outputs["sample"], theirs))
            eager_ms.append(ms)
        else:
            errors.append(None)
    return tuple(errors), tuple(eager_ms)


def measure_costs(replayer: ArtifactReplayer, reference: EagerReference, job: PictureJob) -> Costs:
    """What things cost here: variants that have not run yet are run, and eager makes one evaluation. What runs once for a
    picture is taken to cost eager as many times more as an evaluation does."""
    plans = replayer.artifact.plans
    variants = {name for plan in plans.values() for name in plan.variants()}
    first = next(iter(plans.values()))
    call = replayer.trace(*job, first, 1)[0]
    _, ms = reference.evaluate(call)
    for plan in plans.values():
        if not variant_seconds(replayer, plan.variants()).keys() >= set(plan.variants()):
            replayer.trace(*job, plan, count_opening_steps(plan))
    seconds = variant_seconds(replayer, variants)
    once = sum(s for name, s in replayer.graph_seconds.items() if name.partition(".call")[0] not in variants)
    return Costs(seconds, ms / 1e3, once, once * max(1.0, ms / 1e3 / max(seconds.values())))


def variant_seconds(replayer: ArtifactReplayer, variants: Collection[str]) -> dict[str, float]:
    """Variant -> seconds of its graphs, all calls of an evaluation together, of those that have run."""
    found: dict[str, float] = {}
    for graph, seconds in replayer.graph_seconds.items():
        name = graph.partition(".call")[0]
        if name in variants:
            found[name] = found.get(name, 0.0) + seconds
    return found


@dataclass(frozen=True)
class Comparison:
    """All measurements of one run: samples of the recipe's pictures and of the checked ones, and the worst rows; or, without
    pictures, `traces`. `workload` is what was to be drawn.

    `exact_eager` by number of steps and `exact` by plan are shares, 0..1, over the `checked_pictures`; all empty and 0
    where nothing was checked.
    """

    pictures: tuple[Sample, ...] = ()
    checked: tuple[Sample, ...] = ()
    rows: tuple[PictureRow, ...] = ()
    exact_eager: Mapping[int, float] = field(default_factory=dict)
    exact: Mapping[str, float] = field(default_factory=dict)
    checked_pictures: int = 0
    traces: tuple[Trace, ...] = ()
    workload: Workload | None = None

    @property
    def evaluation_records(self) -> tuple[Sample | Trace, ...]:
        """Whatever has evaluations that were held against eager's."""
        return (*self.pictures, *self.traces)


def measure_pictures(
    replayer: ArtifactReplayer,
    reference: EagerReference,
    workload: Workload,
    checked: CheckedPrompts | None,
    progress: Progress,
) -> Comparison:
    """Draws the workload's pictures, and as many of the `checked` prompts as it says.

    Each evaluation that is held against eager's costs eager another run of the denoiser.
    """
    plans, jobs = replayer.artifact.plans, workload.jobs
    samples: list[Sample] = []
    traces: list[Trace] = []
    worst = WorstRows()
    if workload.traced:
        progress.announce(f"{workload.count.evaluations} evaluations of {len(plans)} plans, held against eager's")
        for name, plan in plans.items():
            traces.append(trace_plan(replayer, reference, workload, plan, workload.forced[name]))
    if jobs:
        progress.announce(f"{len(jobs)} pictures with eager and {len(plans)} plans")
    forced_jobs = [job for job in jobs if job[1] == 0][: workload.forced_jobs]
    for row in draw_rows(replayer, reference, jobs, warm_up=workload.is_whole):
        forced = workload.forced if (row.prompt, row.seed) in forced_jobs else {}
        samples += worst.add(row, compare_row(replayer, reference, row, forced))
    if checked is None or not workload.checked:
        return Comparison(tuple(samples), rows=worst.rows, traces=tuple(traces), workload=workload)
    checked = replace(checked, prompts=checked.prompts[: workload.checked])
    progress.announce(f"prompt accuracy on {len(checked.prompts)} prompts")
    others: list[Sample] = []
    more: list[PictureRow] = []
    numbered = [(prompt, i) for i, prompt in enumerate(checked.prompts)]
    for row in draw_rows(replayer, reference, numbered, warm_up=workload.is_whole):
        others += worst.add(row, compare_row(replayer, reference, row, {}))
        more.append(row.drop_calls())
    return Comparison(
        tuple(samples), tuple(others), worst.rows, *exact_shares(more, checked), len(more), workload=workload
    )


def trace_plan(
    replayer: ArtifactReplayer, reference: EagerReference, workload: Workload, plan: Plan, forced: Collection[int]
) -> Trace:
    """The artifact draws the first steps of its picture, and eager judges evaluations of it."""
    assert workload.traced is not None
    calls = replayer.trace(*workload.traced, plan, workload.steps[plan.name])
    errors, eager_ms = compare_evaluations(reference, calls, forced)
    return Trace(plan.name, errors, eager_ms, tuple((c.graph, c.ms) for c in calls))


def add_size_traces(
    comparison: Comparison,
    replayer: ArtifactReplayer,
    reference: EagerReference,
    prompt: str,
    plans: Sequence[Plan],
    progress: Progress,
) -> Comparison:
    """The comparison with the opening evaluations of the plans of further sizes, whose pictures are not drawn in eager."""
    traces = list(comparison.traces)
    for plan in plans:
        progress.announce(f"evaluations of plan {plan.name}, held against eager's")
        calls = replayer.trace(prompt, 0, plan, count_opening_steps(plan))
        errors, eager_ms = compare_evaluations(reference, calls, range(len(calls)))
        traces.append(Trace(plan.name, errors, eager_ms, tuple((c.graph, c.ms) for c in calls)))
    return replace(comparison, traces=tuple(traces))


class WorstRows:
    """The rows with the lowest PSNR of any plan among all that were drawn, the worst first: means hide pictures."""

    def __init__(self, count: int = REPORT_ROWS) -> None:
        self._count = count
        self._kept: list[tuple[float, PictureRow]] = []

    @property
    def rows(self) -> tuple[PictureRow, ...]:
        return tuple(row for _, row in self._kept)

    def add(self, row: PictureRow, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """Keeps the row, if it is among the worst; its samples."""
        self._kept.append((smallest_psnr_db(s.psnr_db for s in samples), row.drop_calls()))
        self._kept = sorted(self._kept, key=lambda kept: (not math.isnan(kept[0]), kept[0]))[: self._count]
        return samples


def exact_shares(rows: Sequence[PictureRow], checked: CheckedPrompts) -> tuple[dict[int, float], dict[str, float]]:
    """Shares of pictures that are right, 0..1: of eager by number of steps, and of the artifact by plan."""

    def share(drawn: Sequence[DrawnPicture]) -> float:
        return checked.exact([image_array(d.image) for d in drawn], [row.prompt for row in rows])

    eager = {steps: share([row.eager[steps] for row in rows]) for steps in rows[0].eager}
    return eager, {plan: share([row.plans[plan] for row in rows]) for plan in rows[0].plans}
