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
from .budget import PictureJob, Workload, count_opening_steps, spread
from .checked_prompts import CheckedPrompts
from .closeness import psnr_db, relative_error, smallest_psnr_db, ssim
from .equal_inputs import compare_evaluations
from .loss import Bfloat16Loss, KnownEvaluation, KnownPicture
from .reference import EagerReference
from .replayer import ArtifactReplayer, DrawnPicture, image_array

REPORT_ROWS = 6  # that a report shows
SIZE_LOSSES = 2  # evaluations of a further size at which the loss of bfloat16 is measured


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
    `compiled_errors` are against the same variant in eager at the same stored values too, so that they are the compilation's and
    not the cache's. `eager_ms` are the times of the first. All are empty where that was not asked for. `uncached_psnr_db` is a cached
    plan's, against the artifact's own picture without cache.
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
    compiled_errors: tuple[float | None, ...] = ()
    uncached_psnr_db: float | None = None


@dataclass(frozen=True)
class Trace:
    """The first evaluations of one plan that the artifact drew alone; as in `Sample`, None was not held against eager."""

    plan: str
    evaluation_errors: tuple[float | None, ...]
    eager_ms: tuple[float, ...]
    variant_ms: tuple[tuple[str, float], ...]
    compiled_errors: tuple[float | None, ...] = ()


def draw_rows(
    replayer: ArtifactReplayer,
    reference: EagerReference,
    jobs: Sequence[PictureJob],
    *,
    warm_up: bool,
    stored: Mapping[PictureJob, Mapping[str, Collection[int]]] | None = None,
) -> Iterator[PictureRow]:
    """Draws every job; eager and plans take turns, so that what slows this machine down slows all of them down. `stored` are the
    evaluations, by job and plan, whose stored values go on record.

    With `warm_up` the first job is drawn once more before, unseen: the first call of anything is slow.
    """
    plans = replayer.artifact.plans
    for prompt, seed in jobs[: int(warm_up)]:
        reference.draw(prompt, seed, min(p.steps for p in plans.values()))
        for plan in plans.values():
            replayer.draw(prompt, seed, plan)
    for prompt, seed in jobs:
        eager = {steps: reference.draw(prompt, seed, steps) for steps in sorted({p.steps for p in plans.values()})}
        kept = (stored or {}).get((prompt, seed), {})
        drawn = {name: replayer.draw(prompt, seed, p, stored=kept.get(name, ())) for name, p in plans.items()}
        yield PictureRow(prompt, seed, eager, drawn)


def compare_row(
    replayer: ArtifactReplayer,
    reference: EagerReference,
    row: PictureRow,
    forced: Mapping[str, Collection[int]],
    scaled: Mapping[str, Collection[int]],
) -> tuple[tuple[Sample, ...], tuple[KnownEvaluation, ...]]:
    """The figures of a row, plan by plan, with the errors of the evaluations in `forced`, by plan; and what eager gave for those in
    `scaled`."""
    samples, known = [], list[KnownEvaluation]()
    plans = replayer.artifact.plans
    for name, drawn in row.plans.items():
        eager = row.eager[plans[name].steps]
        calls = replayer.evaluations(drawn)
        found = compare_evaluations(reference, plans[name], calls, forced.get(name, ()), scaled.get(name, ()))
        known += found.known
        partner = row.plans.get(uncached_partner(plans, plans[name]) or "")
        samples.append(
            Sample(
                plan=name,
                psnr_db=psnr_db(drawn.image, eager.image),
                ssim=ssim(drawn.image, eager.image),
                latents_relative_error=relative_error(drawn.latents, eager.latents),
                evaluation_errors=found.errors,
                eager_ms=found.eager_ms,
                variant_ms=tuple((c.graph, c.ms) for c in calls),
                seconds=drawn.seconds,
                eager_seconds=eager.seconds,
                compiled_errors=found.compiled,
                uncached_psnr_db=psnr_db(drawn.image, partner.image) if partner else None,
            )
        )
    return tuple(samples), tuple(known)


def uncached_partner(plans: Mapping[str, Plan], plan: Plan) -> str | None:
    """The plan that a cached one approximates: of as many steps and the same size, without cache; None of one without cache."""
    if plan.cache == "none":
        return None
    same = (p.name for p in plans.values() if (p.steps, p.size, p.cache) == (plan.steps, plan.size, "none"))
    return next(same, None)


@dataclass(frozen=True)
class Comparison:
    """All measurements of one run: samples of the recipe's pictures and of the checked ones, and the worst rows; or, without
    pictures, `traces`. `workload` is what was to be drawn. What eager gave is known where `loss` shall say what bfloat16 loses.

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
    known_evaluations: tuple[KnownEvaluation, ...] = ()
    known_pictures: tuple[KnownPicture, ...] = ()
    loss: Bfloat16Loss = field(default_factory=Bfloat16Loss)

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
    known: list[KnownEvaluation] = []
    images: list[KnownPicture] = []
    worst = WorstRows()
    if workload.traced:
        progress.announce(f"{workload.count.evaluations} evaluations of {len(plans)} plans, held against eager's")
        for plan in plans.values():
            trace, found = trace_plan(replayer, reference, workload, plan)
            traces.append(trace)
            known += found
    if jobs:
        progress.announce(f"{len(jobs)} pictures with eager and {len(plans)} plans")
    forced_jobs = [job for job in jobs if job[1] == 0][: workload.forced_jobs]
    stored = dict.fromkeys(forced_jobs, workload.stored)
    for row in draw_rows(replayer, reference, jobs, warm_up=workload.is_whole, stored=stored):
        job = (row.prompt, row.seed)
        forced = workload.forced if job in forced_jobs else {}
        scaled = workload.scaled if job in forced_jobs[:1] else {}
        found, evaluations = compare_row(replayer, reference, row, forced, scaled)
        samples += worst.add(row, found)
        known += evaluations
        images += (KnownPicture(*job, steps, drawn.image) for steps, drawn in row.eager.items())
    result = Comparison(tuple(samples), rows=worst.rows, traces=tuple(traces), workload=workload)
    result = replace(result, known_evaluations=tuple(known), known_pictures=tuple(images))
    if checked is None or not workload.checked:
        return result
    checked = replace(checked, prompts=checked.prompts[: workload.checked])
    progress.announce(f"prompt accuracy on {len(checked.prompts)} prompts")
    others: list[Sample] = []
    more: list[PictureRow] = []
    numbered = [(prompt, i) for i, prompt in enumerate(checked.prompts)]
    for row in draw_rows(replayer, reference, numbered, warm_up=workload.is_whole):
        others += worst.add(row, compare_row(replayer, reference, row, {}, {})[0])
        more.append(row.drop_calls())
    exact_eager, exact = exact_shares(more, checked)
    return replace(
        result,
        checked=tuple(others),
        rows=worst.rows,
        exact_eager=exact_eager,
        exact=exact,
        checked_pictures=len(more),
    )


def trace_plan(
    replayer: ArtifactReplayer, reference: EagerReference, workload: Workload, plan: Plan
) -> tuple[Trace, tuple[KnownEvaluation, ...]]:
    """The artifact draws the first steps of its picture, and eager judges evaluations of it."""
    assert workload.traced is not None
    name = plan.name
    calls = replayer.trace(*workload.traced, plan, workload.steps[name], workload.stored.get(name, ()))
    found = compare_evaluations(reference, plan, calls, workload.forced[name], workload.scaled.get(name, ()))
    return Trace(name, found.errors, found.eager_ms, tuple((c.graph, c.ms) for c in calls), found.compiled), found.known


def add_size_traces(
    comparison: Comparison,
    replayer: ArtifactReplayer,
    reference: EagerReference,
    prompt: str,
    plans: Sequence[Plan],
    progress: Progress,
) -> Comparison:
    """The comparison with the opening evaluations of the plans of further sizes, whose pictures are not drawn in eager."""
    traces, known = list(comparison.traces), list(comparison.known_evaluations)
    for plan in plans:
        progress.announce(f"evaluations of plan {plan.name}, held against eager's")
        steps = count_opening_steps(plan)
        every = [e for e, v in enumerate(plan.evaluations) if v.step < steps]
        whole = [e for e in every if plan.evaluations[e].variant in replayer.artifact.manifest.whole_graphs]
        calls = replayer.trace(prompt, 0, plan, steps, [e for e in every if e not in whole])
        found = compare_evaluations(reference, plan, calls, every, spread(whole, SIZE_LOSSES))
        known += found.known
        variant_ms = tuple((c.graph, c.ms) for c in calls)
        traces.append(Trace(plan.name, found.errors, found.eager_ms, variant_ms, found.compiled))
    return replace(comparison, traces=tuple(traces), known_evaluations=tuple(known))


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
