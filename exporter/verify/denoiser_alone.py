"""Attached: an artifact of a denoiser alone, drawing in its own pipeline, for `verify.py`.

`AttachedReplayer` and `AttachedReference` do for such an artifact what `Replayer` and `Reference` do for
others, and are compared by the same functions. Golden vectors need no pipeline: they are the denoiser's own calls, what
it was given and what it returned, in the order of the plan.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...runtime.artifact import Artifact
from ...runtime.attachment.attach import PlanCursor, attach_opened, run_denoiser
from ...runtime.attachment.facts import graph_name, read_facts
from ...runtime.attachment.scheduler_observer import SchedulerObserver
from ...runtime.errors import ExportError, RequestError
from ...runtime.plan import Evaluation, Plan
from ..denoiser_alone.part import recipe_request
from ..denoiser_alone.recording import record_pipeline
from ..load import source
from ..load.prompts import picture_prompts
from ..recipe.resolve import Recipe
from ..settle import component_dtypes, load_pipeline
from ..sites.component import Component
from .budget import count_opening_steps
from .closeness import relative_error
from .golden import GOLDEN_BYTES, GoldenReplay, check_finite, golden_error, read_golden, save_golden, tolerance_of
from .placement import place_pipeline, reference_dtype
from .reference import cast_components, component_weights
from .replayer import CallRecord, DrawnPicture, EnoughCallsError, GraphCall, tap_graphs


@dataclass(frozen=True)
class EvaluationCall(GraphCall):
    """The denoiser's calls of one evaluation as one: outputs flat, one after the other, and their times added."""

    parts: tuple[GraphCall, ...] = ()


class AttachedReplayer:
    """An artifact that draws in its own pipeline, in the dtypes of the recipe, with its graphs' calls on record.

    The pipeline is loaded when the first picture is drawn, from `model`.
    """

    def __init__(self, artifact: Artifact, recipe: Recipe, model: str) -> None:
        self.artifact, self.recipe, self.model = artifact, recipe, model
        self.record = CallRecord()
        self._tapped = replace(artifact, graphs=tap_graphs(artifact, self.record))

    @cached_property
    def loaded(self) -> source.LoadedPipeline:
        """The pipeline that the artifact is attached to, on its device. Noise is drawn on the CPU all the same."""
        loaded = load_pipeline(self.recipe, component_dtypes(self.recipe), self.model)
        loaded.pipe.to(self.artifact.device)
        return loaded

    def draw(self, prompt: str, seed: int, plan: Plan, *, stored: Collection[int] = ()) -> DrawnPicture:
        """One picture, by that plan; nothing that is stored goes on record. Raises ExportError for a prompt that the artifact does not cover."""
        self.record.clear()
        with attach_opened(self.loaded.pipe, self._tapped, plan.cache != "none"):
            try:
                return draw_picture(self.recipe, self.loaded, prompt, seed, plan.steps, self.record.calls)
            except RequestError as e:
                raise ExportError(f"prompt {prompt!r}: {e}; or set verify.prompts to prompts that it covers") from e

    @property
    def graph_seconds(self) -> Mapping[str, float]:
        """The least seconds of a call, of each graph that was ever called."""
        return self.record.seconds

    def trace(
        self, prompt: str, seed: int, plan: Plan, steps: int, stored: Collection[int] = ()
    ) -> tuple[EvaluationCall, ...]:
        """The evaluations of the plan's first steps, after which the pipeline's call is given up."""
        opening = [e for e in plan.evaluations if e.step < steps]
        self.record.limit = sum(len(e.calls) for e in opening)
        try:
            self.draw(prompt, seed, plan)
        except EnoughCallsError:
            pass
        finally:
            self.record.limit = None
        return join_evaluations(opening, self.record.calls)

    def only(self, plans: Mapping[str, Plan]) -> AttachedReplayer:
        """A replayer of the same artifact with these plans alone."""
        fewer = AttachedReplayer(replace(self.artifact, plans=plans), self.recipe, self.model)
        if "loaded" in vars(self):
            fewer.loaded = self.loaded
        fewer.record.seconds.update(self.record.seconds)
        return fewer

    def evaluations(self, drawn: DrawnPicture) -> tuple[EvaluationCall, ...]:
        """The denoiser's calls joined evaluation by evaluation, in the plan's order."""
        plan = next(p for p in self.artifact.plans.values() if has_plan_calls(p, drawn.calls))
        return join_evaluations(plan.evaluations, drawn.calls)


def has_plan_calls(plan: Plan, calls: Sequence[GraphCall]) -> bool:
    """True if these are the graphs that the plan calls, in its order."""
    return [graph_name(e.variant, c.of) for e in plan.evaluations for c in e.calls] == [c.graph for c in calls]


def join_evaluations(evaluations: Sequence[Evaluation], made: Sequence[GraphCall]) -> tuple[EvaluationCall, ...]:
    """The calls that were made, evaluation by evaluation."""
    calls = iter(made)
    return tuple(join_calls(e.variant, [next(calls) for _ in e.calls]) for e in evaluations)


def join_calls(variant: str, parts: Sequence[GraphCall]) -> EvaluationCall:
    sample = torch.cat([c.outputs["sample"].reshape(-1) for c in parts])
    return EvaluationCall(variant, parts[0].inputs, {"sample": sample}, sum(c.ms for c in parts), parts=tuple(parts))


class AttachedReference:
    """The pipeline as diffusers runs it, in float32. `whole` are the graphs that compute everything."""

    def __init__(
        self, recipe: Recipe, loaded: source.LoadedPipeline, whole: Collection[str], device: torch.device | None = None
    ) -> None:
        self._recipe, self._loaded, self._whole = recipe, loaded, whole
        self._dtype, self._device = reference_dtype(recipe), device or torch.device("cpu")
        request = recipe_request(recipe, loaded, picture_prompts(recipe)[0])
        self._denoisers = record_pipeline(loaded.pipe, request, ()).components()
        place_pipeline(loaded.pipe, self._device)
        if self._device.type != "cpu":
            for denoiser in self._denoisers:
                denoiser.module.to(self._device)

    @property
    def pipe(self) -> Any:
        """The pipeline itself."""
        return self._loaded.pipe

    @property
    def scheduler(self) -> str:
        """The class, as a plan names it."""
        return type(self._loaded.pipe.scheduler).__name__

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, steps: int) -> DrawnPicture:
        return draw_picture(self._recipe, self._loaded, prompt, seed, steps, ())

    @torch.no_grad()
    def evaluate(self, call: GraphCall) -> tuple[Tensor, float]:
        """What the denoiser returns at the inputs of one evaluation, flat, and its milliseconds."""
        assert isinstance(call, EvaluationCall)
        start = time.perf_counter()
        samples = [self._denoiser(part).module(*self._given(part)) for part in call.parts]
        return torch.cat([s.reshape(-1).float().cpu() for s in samples]), (time.perf_counter() - start) * 1e3

    def weights(self) -> dict[str, Tensor]:
        """Everything that the denoiser holds."""
        return component_weights(replace(d, name="denoiser") for d in self._denoisers)

    def is_whole(self, call: GraphCall) -> bool:
        """Whether the call computes everything."""
        return call.graph in self._whole

    def evaluate_variant(self, call: GraphCall) -> Tensor | None:
        """None: an artifact of a denoiser alone does not keep what its variants are made of."""
        return None

    def cast_to_bfloat16(self) -> None:
        """From here on the pipeline is what `from_pretrained(torch_dtype=torch.bfloat16)` gives."""
        cast_components(self._loaded.pipe, torch.bfloat16)
        self._dtype = torch.bfloat16

    def _denoiser(self, part: GraphCall) -> Component:
        _, _, number = part.graph.partition(".call")
        return self._denoisers[int(number) - 1 if number else 0]

    def _given(self, part: GraphCall) -> list[Tensor]:
        tensors = (part.inputs[name] for name in self._denoiser(part).inputs)
        return [t.to(self._device, self._dtype if t.is_floating_point() else t.dtype) for t in tensors]


def draw_picture(
    recipe: Recipe, loaded: source.LoadedPipeline, prompt: str, seed: int, steps: int, calls: Sequence[GraphCall]
) -> DrawnPicture:
    """One call of the pipeline as it is now, in the CPU's memory. `calls` are what was on record when it is done."""
    pipe = loaded.pipe
    with watch_last_step(pipe.scheduler) as last:
        start = time.perf_counter()
        result = pipe(**recipe_request(recipe, loaded, prompt, output_type="pt")(steps, seed))
        seconds = time.perf_counter() - start
    return DrawnPicture(
        picture_tensor(type(pipe).__name__, result).cpu(), last[-1].float().cpu(), seconds, tuple(calls)
    )


@contextlib.contextmanager
def watch_last_step(scheduler: Any) -> Iterator[list[Tensor]]:
    """A list that holds what the scheduler's `step` returned last."""
    last: list[Tensor] = []
    scheduler.step = SchedulerObserver(
        scheduler, "step", lambda result, *_, **__: last.__setitem__(slice(None), [result[0]])
    )
    try:
        yield last
    finally:
        del scheduler.step


def picture_tensor(pipeline: str, result: Any) -> Tensor:
    """The pipeline's picture [1, 3, H, W], or its video [1, T, 3, H, W], in 0..1. Raises ExportError for anything else."""
    value = next(iter(result.values()))
    if isinstance(value, Tensor) and value.dim() in (4, 5) and value.shape[-3] == 3:
        return value.float()
    raise ExportError(
        f"{pipeline}: expected pictures or frames to compare, got something else; export with --no-verify, and compare it yourself"
    )


# --- golden vectors -------------------------------------------------------------------------------------------------


def write_attached_plan_golden(replayer: AttachedReplayer, recipe: Recipe, name: str) -> None:
    """The golden vectors of one plan, in the folder of the replayer's artifact.

    `input.<e>.<b>.<name>` and `output.<e>.<b>` are of the b-th call of evaluation e; an input that is equal at every
    evaluation stands there once, as `input.<b>.<name>`.
    """
    artifact, plan = replayer.artifact, replayer.artifact.plans[name]
    evaluations = replayer.trace(picture_prompts(recipe)[0], 0, plan, count_opening_steps(plan))
    check_finite(evaluations, name)
    save_golden(artifact.folder, name, attached_golden_tensors(evaluations))


def attached_golden_tensors(evaluations: Sequence[EvaluationCall]) -> dict[str, Tensor]:
    """The first evaluations, as many as are within the bytes of a golden file, and at least one."""
    tensors: dict[str, Tensor] = {}
    for e, evaluation in enumerate(evaluations):
        fresh: dict[str, Tensor] = {}
        for b, part in enumerate(evaluation.parts):
            for name, tensor in part.inputs.items():
                if name == "coefficients":
                    continue
                shared = f"input.{b}.{name}"
                if all(b < len(x.parts) and torch.equal(x.parts[b].inputs[name], tensor) for x in evaluations):
                    fresh[shared] = tensor
                else:
                    fresh[f"input.{e}.{b}.{name}"] = tensor
            fresh[f"output.{e}.{b}"] = part.outputs["sample"]
        if e and sum(t.nbytes for t in (tensors | fresh).values()) > GOLDEN_BYTES:
            break
        tensors |= fresh
    return {name: t.contiguous().clone() for name, t in tensors.items()}


def replay_attached_golden(artifact: Artifact, plan: Plan) -> GoldenReplay:
    """The stored calls made again."""
    stored = read_golden(artifact, plan.name)
    facts, run = read_facts(artifact), PlanCursor(plan)
    errors: list[list[float]] = []
    bitwise = True
    while (call := run.call) and f"output.{run.evaluation}.{run.branch}" in stored:
        e, b = run.evaluation, run.branch
        names = (a.name for a in facts.calls[call.of] if a.is_input)
        given = {n: stored.get(f"input.{b}.{n}", stored.get(f"input.{e}.{b}.{n}")) for n in names}
        try:
            sample = run_denoiser(
                artifact, run, call, {n: t.to(artifact.device) for n, t in given.items() if t is not None}
            )
        except RequestError as error:  # of the stored inputs: nobody asked for anything
            raise golden_error(plan, f"'input.{e}.{b}' does not fit: {error}") from error
        reference = stored[f"output.{e}.{b}"].to(artifact.device)
        if (reference.shape, reference.dtype) != (sample.shape, sample.dtype):
            raise golden_error(plan, f"'output.{e}.{b}' is not what the graph returns")
        errors += [[]] if b == 0 else []
        errors[e].append(relative_error(sample, reference))
        bitwise = bitwise and torch.equal(sample, reference)
    if not errors:
        raise golden_error(plan, "has no output of the first evaluation")
    return GoldenReplay(
        plan=plan.name,
        evaluations=tuple(range(len(errors))),
        evaluation_errors=tuple(max(of_one) for of_one in errors),
        embeddings_relative_error=0.0,
        initial_latents_equal=True,
        input_ids_equal=True,
        final_latents_relative_error=None,
        image_psnr_db=None,
        bitwise=bitwise,
        tolerance=tolerance_of(artifact.manifest),
    )
