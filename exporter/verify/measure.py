"""Quality: an artifact and the eager pipeline draw the same prompts and seeds, and figures say how far apart they are.

In: an open artifact, and optionally the float32 diffusers pipeline that it was made of. Out: `DrawnPicture` pictures, and
one `Sample` of figures for each picture and plan. The artifact is called as its user calls it, through the runtime's `Pipeline`; its
graphs are tapped, so that every evaluation's inputs, outputs and time are seen and no loop is written twice.
Times are wall times on the CPU.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...runtime.artifact import Artifact, BoundGraph
from ...runtime.manifest import Graph, Manifest
from ...runtime.pipeline import Pipeline
from ...runtime.plan import Plan
from ..families.picture import Size, example_picture, read_size
from ..families.registry import Family
from ..load.source import EMBEDDED_MODELS
from ..progress import Progress
from ..recipe.schema import Guidance
from .budget import Costs, PictureJob, Workload, count_opening_steps

REPORT_ROWS = 6  # that a report shows
MIN_MSE = 1e-12  # pictures closer than this are equal: 120 dB


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures in 0..1, or of all frames of two videos, in dB, 120 at most. Not rounded to
    8 bits, which would end at 59."""
    mse = (a.double() - b.double()).square().mean().item()
    return mse if math.isnan(mse) else -10 * math.log10(max(mse, MIN_MSE))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two pictures [1, 3, H, W] in 0..1, or the mean over the frames of two videos
    [1, T, 3, H, W]; 1 is equal. scikit-image's, windows of 7 x 7."""
    from skimage.metrics import structural_similarity

    def similarity(x: np.ndarray, y: np.ndarray) -> float:
        similar: Any = structural_similarity(x, y, channel_axis=-1, data_range=1.0)
        return float(similar)

    stills = [t.reshape(-1, *t.shape[-3:]).permute(0, 2, 3, 1).double().cpu().numpy() for t in (a, b)]  # [T, H, W, 3]
    return statistics.fmean(map(similarity, *stills))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| in L2: 0 where both are zero, inf where only the reference is. NaN stays NaN."""
    difference, size = (value.double() - reference.double()).norm().item(), reference.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf


def largest_error(errors: Iterable[float]) -> float:
    """The largest, and NaN is larger than any: `max` would pass over it."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def smallest_psnr_db(found: Iterable[float]) -> float:
    """The smallest, and NaN is smaller than any: `min` would pass over it."""
    return min(found, key=lambda db: (not math.isnan(db), db))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The mean, and the ends of its 95 % confidence interval by Student's t, to 0.1; None for fewer than two values, which have
    none, and where one is no number."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    from scipy.special import stdtrit

    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return round(mean, 1), round(mean - half, 1), round(mean + half, 1)


def covered_share(count: int) -> float:
    """The share of all evaluations, 0..1, that 95 % confidence says are no worse than the worst of `count` drawn at random."""
    return 0.05 ** (1 / count)


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphCall:
    """One call of one graph. What it read from and stored to sites is left out: it can be larger than the latents by far."""

    graph: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    ms: float


@dataclass(frozen=True)
class DrawnPicture:
    """A picture [1, 3, H, W] in 0..1, or a video [1, T, 3, H, W], the final latents it was decoded from, and the wall time
    of the whole call."""

    image: Tensor
    latents: Tensor
    seconds: float
    calls: tuple[GraphCall, ...] = ()


class EnoughCallsError(Exception):
    """As many calls are on record as were asked for."""


class CallRecord:
    """The calls of a picture, and the least seconds that a call of each graph ever took. With a `limit`, the call that reaches
    it raises EnoughCallsError to whoever draws."""

    def __init__(self) -> None:
        self.calls: list[GraphCall] = []
        self.seconds: dict[str, float] = {}
        self.limit: int | None = None

    def add(self, call: GraphCall) -> None:
        self.calls.append(call)
        self.seconds[call.graph] = min(call.ms / 1e3, self.seconds.get(call.graph, math.inf))
        if len(self.calls) == self.limit:
            raise EnoughCallsError


class GraphTap(BoundGraph):
    """A bound graph that puts every call on record, in the CPU's memory: the pipeline that it is compared with is there."""

    def __init__(self, bound: BoundGraph, sites: Iterable[str], record: CallRecord) -> None:
        self.graph: Graph = bound.graph
        self._bound, self._sites, self.record = bound, frozenset(sites), record

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        start = time.perf_counter()
        outputs = self._bound(inputs)
        if any(t.is_cuda for t in outputs.values()):
            torch.cuda.synchronize()  # the call returned when its work was queued
        ms = (time.perf_counter() - start) * 1e3
        given = {name: t.cpu() for name, t in inputs.items() if "@" not in name}
        came = {name: t.cpu() for name, t in outputs.items() if name not in self._sites}
        self.record.add(GraphCall(self.graph.name, given, came, ms))
        return outputs


class ArtifactReplayer(Protocol):
    """What draws with an artifact: `Replayer`, or of a denoiser alone `AttachedReplayer`."""

    artifact: Artifact

    @property
    def graph_seconds(self) -> Mapping[str, float]: ...
    def draw(self, prompt: str, seed: int, plan: Plan) -> DrawnPicture: ...
    def trace(self, prompt: str, seed: int, plan: Plan, steps: int) -> Sequence[GraphCall]: ...
    def only(self, plans: Mapping[str, Plan]) -> ArtifactReplayer: ...
    def evaluations(self, drawn: DrawnPicture) -> Sequence[GraphCall]: ...


class EagerReference(Protocol):
    """What an artifact is held against: `Reference`, or `AttachedReference`."""

    @property
    def scheduler(self) -> str: ...
    def draw(self, prompt: str, seed: int, steps: int) -> DrawnPicture: ...
    def evaluate(self, call: GraphCall) -> tuple[Tensor, float]: ...


class Replayer:
    """An open artifact that draws as it does for its user, with the calls of its graphs on record.

    Where a picture is required it gets `families.picture.example` of the seed, as the family's own `draw` gives it to eager.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.variants = frozenset(artifact.variants)
        self.record = CallRecord()
        sites = {tensor for site in artifact.manifest.sites for tensor in site.tensors}
        taps = {name: GraphTap(bound, sites, self.record) for name, bound in artifact.graphs.items()}
        compared = artifact.manifest.model_copy(
            update={"unverified": ()}
        )  # or about to be, so that nobody need be told
        self._pipe = Pipeline(replace(artifact, graphs=taps, manifest=compared))
        self._pipe.set_progress_bar_config(disable=True)

    @property
    def graph_seconds(self) -> Mapping[str, float]:
        """The least seconds of a call, of each graph that was ever called."""
        return self.record.seconds

    def draw(self, prompt: str, seed: int, plan: Plan, steps: int | None = None) -> DrawnPicture:
        """One picture by that plan, or what the decoder makes of the latents after its first `steps`."""
        self.record.calls.clear()
        arguments = call_arguments(self._pipe, seed, plan)
        if steps is not None and steps < plan.steps:
            arguments["callback_on_step_end"] = stop_after(steps)
        start = time.perf_counter()
        with warnings.catch_warnings():  # of the exporter's own prompts, which the pipeline cuts at the same place
            warnings.filterwarnings("ignore", "the prompt is longer")
            output: Any = self._pipe(prompt, **arguments)
        seconds = time.perf_counter() - start
        calls = tuple(self.record.calls)
        latents = next(c.inputs["latents"] for c in calls if c.graph == "vae_decoder")
        return DrawnPicture(output[0].cpu(), latents, seconds, calls)

    def trace(self, prompt: str, seed: int, plan: Plan, steps: int) -> tuple[GraphCall, ...]:
        """The denoiser's calls of the plan's first steps."""
        return self.evaluations(self.draw(prompt, seed, plan, steps))

    def only(self, plans: Mapping[str, Plan]) -> Replayer:
        """A replayer of the same artifact with these plans alone."""
        fewer = Replayer(replace(self.artifact, plans=plans))
        fewer.record.seconds.update(self.record.seconds)
        return fewer

    def evaluations(self, drawn: DrawnPicture) -> tuple[GraphCall, ...]:
        """The denoiser's calls, in the order of the plan's evaluations."""
        return tuple(c for c in drawn.calls if c.graph in self.variants)


def stop_after(steps: int) -> Callable[..., dict[str, Tensor]]:
    """A callback that interrupts a call after its first steps."""

    def interrupt(pipe: Any, step: int, _timestep: float, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step + 1 >= steps
        return {}

    return interrupt


def call_arguments(pipe: Pipeline, seed: int, plan: Plan) -> dict[str, Any]:
    """What an artifact is called with, besides the prompt, to draw the seed's picture by that plan."""
    chosen = {"seed": seed, "num_inference_steps": plan.steps, "cache": plan.cache != "none", "output_type": "pt"}
    return {**chosen, **example_arguments(pipe, seed)}


def example_arguments(pipe: Pipeline, seed: int) -> dict[str, Any]:
    """The argument `image` of artifacts that draw nothing without one. Where calls begin from it they begin with the plan's
    first step: all that is in the plan is measured, and not its end alone."""
    picture = pipe.family_rules.settings.picture
    if picture is None or not picture.required:
        return {}
    whole = {"strength": 1.0} if picture.role == "start" else {}
    return {"image": example_picture(Size(picture.height, picture.width, 0), seed), **whole}


class Reference:
    """The pipeline as diffusers runs it: float32, nothing fused, quantized, cached or compiled. `family` is its exporter module,
    `guidance` the recipe's table."""

    def __init__(self, pipe: Any, family: Family, manifest: Manifest, guidance: Guidance) -> None:
        self._pipe, self._family = pipe, family
        self._size, self._guidance_scale = read_size(manifest), manifest.defaults.guidance_scale
        self._denoiser = family.denoiser(pipe, self._size, guidance)

    @property
    def scheduler(self) -> str:
        """The class, as a plan names it."""
        return type(self._pipe.scheduler).__name__

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, steps: int) -> DrawnPicture:
        start = time.perf_counter()
        latents, image = self._family.draw(self._pipe, prompt, seed, steps, self._guidance_scale, self._size)
        return DrawnPicture(image, latents, time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self, call: GraphCall) -> tuple[Tensor, float]:
        """The denoiser's output at this call's inputs (the artifact's own, so errors do not add up), and its milliseconds."""
        given = (call.inputs[name] for name in self._denoiser.inputs)
        args = [t.float() if t.is_floating_point() else t for t in given]
        start = time.perf_counter()
        sample = self._denoiser.module(*args)
        return sample, (time.perf_counter() - start) * 1e3


# --- comparing ------------------------------------------------------------------------------------------------------


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


# --- prompts, and whether a picture shows what its prompt says -------------------------------------------------------


@dataclass(frozen=True)
class CheckedPrompts:
    """Prompts whose pictures can be judged, each drawn with its index as the seed. `exact` gives the share, 0..1, of the
    images [H, W, 3] that show all that their prompt says."""

    prompts: tuple[str, ...]
    exact: Callable[[list[np.ndarray], list[str]], float]


def checked_prompts(model: str) -> CheckedPrompts | None:
    """The accuracy prompts and the checker that come with a model, or None."""
    if model not in EMBEDDED_MODELS:
        return None
    from ..shapes import read_prompt_set
    from ..shapes.checker import accuracy

    return CheckedPrompts(tuple(read_prompt_set("full")), lambda images, texts: accuracy(images, texts)["exact"])


def image_array(image: Tensor) -> np.ndarray:
    """[1, 3, H, W] in 0..1 as float32 [H, W, 3], a video [1, T, 3, H, W] as [T, H, W, 3]; NaN is black."""
    return image[0].movedim(-3, -1).float().nan_to_num().cpu().numpy()
