"""The callable that an artifact becomes: `load("artifacts/x")("a red circle", seed=7).images[0]`.

It has diffusers' calling conventions, and its order: prompts to embeddings, noise, the loop, the decoder. Images go through the
loop in groups, as large as the artifact has graphs for. Their noise is drawn at once all the same, and equals what diffusers
draws from the same generator.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

import torch

from .artifact import Artifact, open_artifact
from .call.arguments import describe_argument, unknown_argument_error
from .call.attributes import absent_attribute_error, refuse_move
from .call.batches import split_pictures
from .call.progress import Advance, check_bar_options, step_bar
from .call.state import CallState
from .check.artifact import PublicKey, Trust, status_problems
from .drawing.drawing import CallGraphs, PictureGroup, format_output
from .drawing.request import Request, RequestReader
from .errors import RequestError, raise_problems
from .families import Family, artifact_families, family_class
from .figures import PlanFigures, format_plans, plan_figures
from .finite import EvaluationCallback, refuse_nonfinite, refuse_nonfinite_result, watch_latents
from .gpu.graph_loop import loop_of
from .manifest import ATTACH_FAMILY
from .noise import Generators
from .offload import OffloadRequest as Offload
from .plan import Plan
from .process.default_device import CPU, default_device, find_default_device
from .process.fork import came_through_fork, run_beside_fork
from .process.self_test import refuse_wrong_arithmetic
from .replay import StopReplay, is_step_end, replay
from .runners import CancelFlag, EitherFlag, refuse_cancelled
from .sizes.size_range import SizeRange
from .start import AfterStep, evaluation_callback

PROMPT_ARGUMENTS = ("negative_prompt", "prompt_embeds", "negative_prompt_embeds")  # a family takes them, or not
StepCallback = Callable[["Pipeline[Any]", int, float, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


def load(
    folder: str | Path,
    *,
    cache_dir: str | Path | None = None,
    trust: Trust = "hash",
    public_key: PublicKey | None = None,
    minimum_release: int | None = None,
    runners: int | None = None,
    offload: Offload = False,
    copy: bool = False,
    warm: bool = False,
) -> ImagePipeline | VideoPipeline:
    """The artifact in `folder`, checked, opened, and ready to be called: `load("artifacts/x")("a red circle").images[0]`.

    It is an ImagePipeline or, of models that make videos, a VideoPipeline, whose calls give `frames`; `isinstance` tells.

    An artifact holds machine code: take it only from someone you trust. `trust` is what is compared before any of it is
    opened: "hash", every file with the manifest; "signature", the manifest with its signature too, by the holder of
    `public_key`; "size", weights by their sizes alone, which saves most of the time for large models. With "signature", an artifact whose
    release (`prebake sign --release`) is below `minimum_release` is refused: an older one is as well signed. `cache_dir` is where
    code is unpacked (default: `$XDG_CACHE_HOME/prebake`, private to the user), and where is noted which files were found
    right, so that they are not hashed again until they change; what that cannot see is in verified.py. `runners` is how many
    calls, from so many threads, are at work at once while others wait; by default on the CPU as many as there are cores for,
    each with torch's number of threads, and one on a GPU. `offload`, for artifacts of a GPU: True, or graphs such as
    `["text_encoder"]`, keeps the weights of what runs once for a prompt in pinned memory of the host, and on the GPU only
    while it runs; the denoiser and the decoder stay. `copy` reads the weights into memory of this process, where on the CPU they are
    else mapped from their files: for files that somebody may write into. `warm` reads the weights before it returns, a thread for
    each core and a file for each thread, so that no call waits for the disk; mapped pages are else read when a call first needs
    them, unless their files have just been hashed. Raises ArtifactError with everything that is wrong, or does not fit this
    machine, and RequestError for arguments that mean nothing here, and for an artifact that holds a denoiser alone.
    """
    artifact = open_artifact(
        folder,
        cache_dir=cache_dir,
        trust=trust,
        public_key=public_key,
        minimum_release=minimum_release,
        runners=runners,
        offload=offload,
        copy=copy,
        warm=warm,
    )
    raise_problems(folder, status_problems(artifact.manifest))
    if artifact.manifest.family == ATTACH_FAMILY:
        raise RequestError(
            f"{folder}: holds the denoiser of {artifact.manifest.source.pipeline} alone; load that pipeline with diffusers and "
            "give both to prebake.runtime.attach, or export with model.part=pipeline where it has a family"
        )
    video = family_class(artifact).output_kind == "frames"
    return VideoPipeline(artifact) if video else ImagePipeline(artifact)


class ImageOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor over all images, as `output_type` says.

    It is also the plain tuple that diffusers gives for `return_dict=False`.
    """

    images: Any

    @property
    def frames(self) -> Any:
        """Raises AttributeError: so code that reads a video's frames says what is wrong, and type checks for both kinds."""
        raise AttributeError("frames: this artifact makes images; read images")


class VideoOutput(NamedTuple):
    """`frames`: for each video a list of PIL images, or an array or tensor [B, T, ...] over all, as `output_type` says."""

    frames: Any

    @property
    def images(self) -> Any:
        """Raises AttributeError, as `ImageOutput.frames` does."""
        raise AttributeError("images: this artifact makes videos; read frames")


OutputT = TypeVar("OutputT", ImageOutput, VideoOutput)


class Pipeline(Generic[OutputT]):
    """An open artifact. One may be called from many threads: nothing of a call is kept here, and no more calls are at work at
    once than it has runners.

    A callback stops its own call by `pipe._interrupt = True`, as in diffusers; any other thread by the call's `cancel`. It changes
    the guidance of the steps that follow by `pipe._guidance_scale`. What else diffusers' pipelines have raises, and says why.
    `close` gives back what the artifact holds, and so does leaving a `with` block.
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self.families = artifact_families(artifact)
        self.family_rules = self.families[0]
        self._reader = RequestReader(artifact, self.families, CALL_ARGUMENTS)
        self._graphs = CallGraphs(artifact, self.families)
        self._loop = loop_of(artifact.manifest)
        self._progress_bar_config: dict[str, Any] = {}
        self._request = CallState()  # the last: from now on no other attribute can be set

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        num_videos_per_prompt: int | None = None,
        generator: Generators = None,
        seed: int | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        cache: bool = True,
        cancel: CancelFlag | None = None,
        **more: Any,
    ) -> OutputT:
        """Images for the prompt or prompts, `num_images_per_prompt` of each, prompt after prompt; or videos, for which
        `num_videos_per_prompt` is diffusers' name.

        `num_inference_steps` picks one of the artifact's plans, `cache=False` that plan without its cache. `seed` is
        short for `generator=torch.Generator().manual_seed(seed)`. `guidance_scale` has no effect where the model takes
        none, as in diffusers. The arguments that say what to draw are those of the artifact's family, `family.arguments`,
        by diffusers' names (`more`: `pooled_prompt_embeds`, `guidance_rescale`, ...); one `negative_prompt` may stand for
        all. `latents` are as the family's pipeline has them, FLUX's packed, and so is the output of
        `output_type="latent"`. What changes the text encoder or the scheduler (`clip_skip`, `eta`, ...) is no argument
        here: that was fixed at export.

        `image` is where to begin, `strength` how far to go from it, 0 to 1, and `mask_image` white where to draw and black
        where the image stays: all as in diffusers' pipelines for image-to-image and inpainting, in artifacts that were
        exported for it. One image may stand for all prompts.

        `callback_on_step_end(pipe, step, timestep, {"latents": [B, ...]})` is called after each step of each B images that are drawn
        together, as many as the largest of `batches` that fits; the latents that it returns replace the loop's. An interrupted call gives the images up to the interrupted one.
        `return_dict` may be given and changes nothing: the output is a tuple either way.

        `cancel`, a `threading.Event` that another thread may set, ends the call with Cancelled where it is next looked at:
        while the call waits for a runner, and between evaluations of the denoiser.

        Raises RequestError for what the artifact was not exported for, naming what it has.
        """
        request = self._reader.read(
            {
                "prompt": prompt,
                "prompt_2": prompt_2,
                "negative_prompt": negative_prompt,
                "prompt_embeds": prompt_embeds,
                "negative_prompt_embeds": negative_prompt_embeds,
                **more,
            },
            image=image,
            mask_image=mask_image,
            strength=strength,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            seed=seed,
            latents=latents,
            output_type=output_type,
            max_sequence_length=max_sequence_length,
            cache=cache,
        )
        check_callback(callback_on_step_end_tensor_inputs, callback_on_step_end, cancel)
        after = self._after_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        stop = threading.Event()
        cancel = EitherFlag(stop, cancel) if came_through_fork() else cancel

        @torch.no_grad()
        def make() -> OutputT:
            self._interrupt = False
            refuse_wrong_arithmetic()
            self.artifact.refuse_changed_weights()
            with default_device(CPU), self.artifact.runners.one(cancel), self._graphs.explain_memory():
                start = self._graphs.begin(request)
                finals: list[torch.Tensor] = []
                with step_bar(self._progress_bar_config, request.plan.steps * len(start)) as advance:
                    for pictures in split_pictures(len(start), self.batches):
                        refuse_cancelled(cancel)
                        group = self._graphs.group(request, start, pictures)
                        finals += self._draw(request, group, after, advance, cancel).split(1)
                        if self._interrupt:
                            break
                refuse_nonfinite_result(request.plan, torch.cat(finals))
                made = torch.cat(finals) if output_type == "latent" else self._decode(request.family, finals)
                return self._output(request, made)

        return run_beside_fork(make, stop.set)

    def _draw(
        self,
        request: Request,
        group: PictureGroup,
        after: AfterStep | None,
        advance: Advance | None,
        cancel: CancelFlag | None,
    ) -> torch.Tensor:
        """The final latents [B, ...] of pictures that go through the loop together."""
        plan, batch = request.plan, len(group.latents)
        watch = evaluation_callback(plan, group.blend, after)
        by_step = (
            advance if watch or self._loop is replay else None
        )  # a recorded loop is not looked into for a bar's sake
        watch = watch_latents(plan, self.device, watch_steps(plan, by_step, batch, watch))
        watch = watch_cancellation(cancel, watch)
        with self._request.track_picture(plan.steps, request.guidance_scale, group.inputs):
            finals = self._loop(
                group.tables,
                group.variants,
                self._graphs.sites,
                group.inputs,
                group.latents,
                noise=group.noise,
                on_evaluation=watch,
            )
        if advance and not by_step:
            advance(plan.steps * batch)
        return finals

    # --- its end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Waits for the calls that are at work, and gives back all that the artifact holds: its files are mapped no more, so the disk
        space of one that was replaced is free. A call that begins afterwards, or waits for a runner, raises RequestError, and so
        does closing in a callback. Closing again does nothing."""
        self.artifact.close()
        self._loop = replay  # recordings hold memory of the GPU

    @property
    def closed(self) -> bool:
        """Whether it can be called no more."""
        return self.artifact.runners.usage.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what it is -----------------------------------------------------------------------------------------------

    @property
    def family(self) -> str:
        """The family of its model, as the manifest names it: `flux`, `sdxl`, ..."""
        return self.artifact.manifest.family

    @property
    def device(self) -> torch.device:
        """Where it runs, and where latents given to a callback are."""
        return self.artifact.device

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps that `num_inference_steps` may be, the default first."""
        default = self.artifact.manifest.defaults.num_inference_steps
        return tuple(dict.fromkeys((default, *(plan.steps for plan in self.artifact.plans.values()))))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) in pixels that it makes, the default first; in an artifact of a `range` the default one alone."""
        return tuple((family.height, family.width) for family in self.families)

    @property
    def range(self) -> SizeRange | None:
        """The heights and widths that a call may ask for, each from `min` to `max` by `step`; None where `sizes` lists all."""
        return self.artifact.manifest.range

    @property
    def batches(self) -> tuple[int, ...]:
        """How many images may go through the loop together: a call of 7 with (1, 2, 4) makes 4, then 2, then 1."""
        return self.artifact.manifest.batches

    @property
    def plans(self) -> dict[str, PlanFigures]:
        """Its plans by name, with the loss and the speed that a verification measured: see `PlanFigures`."""
        return plan_figures(self.artifact.folder, self.artifact.manifest, self.artifact.plans)

    def __repr__(self) -> str:
        manifest = self.artifact.manifest
        frames = "" if manifest.defaults.num_frames is None else f"{manifest.defaults.num_frames} frames of "
        sizes = ", ".join(f"{frames}{width} x {height}" for height, width in self.sizes)
        sizes += f" ({self.range})" if self.range else ""
        head = f"{type(self).__name__} {self.artifact.folder}: {self.family} on {self.device}, {sizes}, {manifest.status_line}"
        return "\n".join([head, *(f"  {line}" for line in format_plans(self.plans))])

    @property
    def interrupt(self) -> bool:
        """Whether the call that this thread is in has been told to stop."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self._request.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._request.interrupt = value

    # --- what diffusers' pipelines have besides their call ----------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """The steps of the call that this thread is in, or was in last; before any, those that a call takes by default."""
        last = self._request.last
        return last.steps if last else self.artifact.manifest.defaults.num_inference_steps

    @property
    def guidance_scale(self) -> float:
        """The guidance of the step that this thread's call is in, or was in last; before any the default."""
        last = self._request.last
        return last.guidance_scale if last else self.artifact.manifest.defaults.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._request.change_guidance(value, by_step=self.family_rules.guides_by_step)

    @property
    def _guidance_rescale(self) -> float:
        last = self._request.last
        return float(last.inputs["guidance_rescale"][0]) if last and "guidance_rescale" in last.inputs else 0.0

    @_guidance_rescale.setter
    def _guidance_rescale(self, value: float) -> None:
        self._request.change_rescale(value)

    def set_progress_bar_config(self, **options: Any) -> None:
        """How a call shows its progress, by tqdm's options in place of those before: `disable=True` never, `disable=False` always.

        By default a call shows its steps on standard error where that is a terminal. Raises RequestError for other options.
        """
        check_bar_options(options)
        self._progress_bar_config = options

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself, for the device that it is on and the dtype that it has. Raises RequestError for others: code is compiled for one."""
        if unknown := sorted(kwargs.keys() - {"device", "dtype", "silence_dtype_warnings"}):
            raise unknown_argument_error(unknown[0], "to", ("device", "dtype", "silence_dtype_warnings"))
        asked = (*args, *(kwargs[name] for name in ("device", "dtype") if kwargs.get(name) is not None))
        refuse_move(asked, self.device, self.artifact.manifest.recipe.get("precision", {}).get("denoiser", ""))
        return self

    def __getattr__(self, name: str) -> Any:
        """Raises AbsentAttributeError, which says how to have what diffusers' attribute of that name does."""
        raise absent_attribute_error(type(self).__name__, name, dir(type(self)))

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what there is. Raises AbsentAttributeError for anything else: it would have no effect."""
        if "_request" in vars(self) and name not in vars(self) and not hasattr(type(self), name):
            raise absent_attribute_error(type(self).__name__, name, dir(type(self)))
        super().__setattr__(name, value)

    # --- what belongs to the call alone -------------------------------------------------------------------------

    def _decode(self, family: Family, finals: list[torch.Tensor]) -> torch.Tensor:
        """Final latents [1, ...] of each image as the decoder's pictures."""
        return self._graphs.decode(family, finals)

    def _output(self, request: Request, made: torch.Tensor) -> OutputT:
        """What the caller gets of the final latents, or of what they were decoded to."""
        out = format_output(request.family, made, request.output_type)
        return cast(OutputT, VideoOutput(out) if request.family.output_kind == "frames" else ImageOutput(out))

    def _after_step(
        self, callback: StepCallback | None, callback_inputs: Sequence[str]
    ) -> Callable[[int, float, torch.Tensor], torch.Tensor] | None:
        """The caller's callback, from (step, timestep, latents) to latents, or None."""
        if callback is None:
            return None

        callers_device = find_default_device()

        def after_step(step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
            with default_device(callers_device):
                returned = callback(self, step, timestep, dict.fromkeys(callback_inputs, latents)) or {}
            if unknown := sorted(returned.keys() - {"latents"}):
                raise RequestError(f"callback_on_step_end returned {unknown[0]!r}; only latents can be replaced")
            latents = returned.get("latents", latents)
            refuse_nonfinite("callback_on_step_end: latents", latents)
            if self._interrupt:
                raise StopReplay(latents)
            return latents

        return after_step


class ImagePipeline(Pipeline[ImageOutput]):
    """A pipeline whose calls give `images`."""


class VideoPipeline(Pipeline[VideoOutput]):
    """A pipeline whose calls give `frames`."""


CALL_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(Pipeline.__call__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in PROMPT_ARGUMENTS
)
"""What every artifact's call takes; what else it takes is its family's."""


def check_callback(inputs: Sequence[str], callback: object, cancel: object) -> None:
    """Raises RequestError for a callback, or a `cancel`, that could not be called."""
    if unknown := [name for name in inputs if name != "latents"]:
        raise RequestError(
            f"callback_on_step_end_tensor_inputs: {unknown[0]!r} is not a tensor of the loop; it has latents"
        )
    if callback is not None and not callable(callback):
        raise RequestError(f"callback_on_step_end: expected a function, got {describe_argument(callback)}")
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise RequestError(f"cancel: expected a threading.Event, got {describe_argument(cancel)}")


def watch_steps(
    plan: Plan, advance: Advance | None, batch: int, watch: EvaluationCallback | None
) -> EvaluationCallback | None:
    """What `replay` calls after each evaluation, with a step of the bar for each of its images at the end of each."""
    if advance is None:
        return watch

    def seen(e: int, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
        replaced = watch(e, output, latents) if watch else None
        if is_step_end(plan, e):
            advance(batch)
        return replaced

    return seen


def watch_cancellation(cancel: CancelFlag | None, watch: EvaluationCallback | None) -> EvaluationCallback | None:
    """What `replay` calls after each evaluation, with a look at `cancel` before."""
    if cancel is None:
        return watch

    def seen(e: int, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
        refuse_cancelled(cancel)
        return watch(e, output, latents) if watch else None

    return seen
