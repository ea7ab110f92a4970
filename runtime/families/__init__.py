"""Families: what one kind of pipeline needs around the loop, a module each. The manifest's `family` names it.

`Family` is what all of them share: prompts, guidance between two of them, noise. A module holds only what is particular
to its own.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError

from ..artifact import Artifact
from ..bounds import Float32, Pixels
from ..call.arguments import real_number
from ..errors import ArtifactError, RequestError, describe_schema_error, raise_problems
from ..manifest import SizeEntry, size_graph_name
from ..noise import Generators, draw_noise
from ..plan import FROZEN_CONFIG
from ..prompts import TextEncoder, TextSettings
from ..replay import Tensors
from .call_contract import call_problems

FAMILY_CLASSES = {
    "cogvideox": "CogVideoX",
    "flux": "Flux",
    "flux_kontext": "FluxKontext",
    "sd": "StableDiffusion",
    "sd3": "StableDiffusion3",
    "sdxl": "StableDiffusionXL",
    "pixart": "PixArt",
}
SettingsT = TypeVar("SettingsT", bound=BaseModel)


Strength = Annotated[float, Field(ge=0, le=1)]


class PictureInput(BaseModel):
    """Pictures that a call may take. `role`: a call begins from the picture, or the denoiser looks at it at every step, as
    its input `image_latents`. `height` and `width` are those of the graph `vae_encoder`; `sampled`: latents are drawn
    from what it gives, and not its mean; `required`: the pipeline draws nothing without one. `redrawn`: where each image
    has a generator of its own and several share a picture, its latents are drawn for each (Stable Diffusion), not once by
    the first of them (FLUX).

    `strength` is what a call takes where its caller is silent, `inpaint_strength` with a mask. Of S steps, a strength s
    leaves out the first S - S s, rounded `down` (FLUX) or `up` (Stable Diffusion).
    """

    model_config = FROZEN_CONFIG
    role: Literal["start", "reference"] = "start"
    height: Pixels
    width: Pixels
    sampled: bool = True
    required: bool = False
    redrawn: bool = True
    strength: Strength = 1.0
    inpaint_strength: Strength | None = None
    rounded: Literal["down", "up"] = "up"


class Settings(BaseModel):
    """`manifest.pipeline`. `latents_shape` is that of one image's noise [C, h, w], without the batch; `timestep_scale` times a
    plan's timestep is the denoiser's. Families with facts of their own extend it."""

    model_config = FROZEN_CONFIG
    latents_shape: Annotated[tuple[Pixels, ...], Field(min_length=3, max_length=3)]
    timestep_scale: Float32
    text: TextSettings
    picture: PictureInput | None = None


class ScheduleWindow(NamedTuple):
    """The part of a schedule that a call takes, in the scheduler's timesteps: those below `begin` and not below `end`. None =
    from where the picture's strength says, and to the end."""

    begin: float | None = None
    end: float | None = None


WHOLE_SCHEDULE = ScheduleWindow()


class Family:
    """What `Pipeline` asks of a family at one size: the default one, or the further one `size`. It is made of an open artifact. In an
    artifact of a range `at` has it at each of its sizes, all of which go through the graphs of the default one.

    `latents_shape` is that of one image in the loop, without the batch, and `latents_name` what to call it. Both
    branches of classifier-free guidance, where there are two, are in the denoiser's graph, which takes what differs
    between them as [B, 2, ...], the negative prompt's first. `output_kind` is `images` or `frames`. `guides_by_step`: its pipeline reads
    `guidance_scale` at every step, so that a callback may change it.
    """

    settings_type: ClassVar[type[Settings]] = Settings
    latents_name: ClassVar[str] = "latents"
    output_kind: ClassVar[Literal["images", "frames"]] = "images"
    guides_by_step: ClassVar[bool] = True

    def __init__(self, artifact: Artifact, size: SizeEntry | None = None):
        self.size = size and size.name
        self.range = artifact.manifest.range
        self.height = (size or artifact.manifest.defaults).height
        self.width = (size or artifact.manifest.defaults).width
        self.settings = read_settings(self.settings_type, artifact, size)
        self.latents_shape = self.loop_shape()
        self.inputs = denoiser_inputs(artifact)
        self._device = artifact.device
        self._text = TextEncoder(artifact, self.settings.text)

    def at(self, height: int, width: int) -> Self:
        """The same at a size of the artifact's range. Raises ArtifactError where its latents have no whole sides there."""
        if (height, width) == (self.height, self.width):
            return self
        assert self.range is not None
        other = copy.copy(self)
        other.height, other.width = height, width
        try:
            changed: dict[str, Any] = {"latents_shape": self.range.latents_at(height, width)}
        except ValueError as e:
            raise ArtifactError(f"manifest.json [range.latents_shape]: {e}; export again") from e
        if picture := self.settings.picture:
            changed["picture"] = picture.model_copy(update={"height": height, "width": width})
        other.settings = self.settings.model_copy(update=changed)
        other.latents_shape = other.loop_shape()
        return other

    def decodable(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, *latents_shape] of the loop as the decoder takes them: as they are."""
        return latents

    @property
    def branches(self) -> bool:
        """Whether the graph guides between two prompts."""
        return "guidance_scale" in self.inputs

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of diffusers' `__call__` that say what to draw."""
        rescale = ("guidance_rescale",) if "guidance_rescale" in self.inputs else ()
        return (*self._text.arguments(self.branches), *rescale)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest prompt that the artifact takes."""
        return self._text.max_sequence_length

    def graph_name(self, graph: str) -> str:
        """The graph of that name for this size."""
        return size_graph_name(graph, self.size)

    def arranged(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, *settings.latents_shape] in the layout of the loop."""
        return latents

    def loop_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents in the loop, without the batch."""
        return self.settings.latents_shape

    def draw_latents(self, batch: int, generator: Generators) -> torch.Tensor:
        """Standard normal noise, float32 [B, *latents_shape] on the CPU, the numbers that diffusers draws."""
        return self.arranged(draw_noise((batch, *self.settings.latents_shape), generator))

    def conditions(self, given: Mapping[str, Any], guidance_scale: float) -> list[Tensors]:
        """The denoiser's inputs [1, ...] that are equal at every step, one dict for each prompt. `given` are the arguments that
        the caller gave. Raises ArtifactError for a combination of them that says nothing.

        At a guidance of 1 or less diffusers runs one branch, the prompt's, and ignores the negative prompt. The graph has
        both all the same: here they get the prompt, and `u + 1 (c - u)` of equal u and c is c. That takes as long as
        any other guidance.
        """
        prompts = self._text(given)
        if not self.branches:
            return [{**prompt, **self.scalars(given, guidance_scale)} for prompt in prompts]
        scale = self.branch_guidance(given, guidance_scale)
        negatives = self.negatives(given, len(prompts)) if scale > 1 else prompts
        scalars = {**self.scalars(given, guidance_scale), "guidance_scale": self.scalar(max(scale, 1.0))}
        return [
            {**{name: torch.stack((negative[name], prompt[name]), dim=1) for name in prompt}, **scalars}
            for negative, prompt in zip(negatives, prompts, strict=True)
        ]

    def example_condition(self) -> Tensors:
        """The denoiser's inputs that are equal at every step, of embeddings that say nothing: what a call gives, by shape and
        dtype."""
        given = dict(self._text.zero_arguments(""))
        if self.branches:
            given |= self._text.zero_arguments("negative_")
        return self.conditions(given, 2.0)[0]

    def window(self, given: Mapping[str, Any]) -> ScheduleWindow:
        """Which part of the schedule the caller asked for."""
        return WHOLE_SCHEDULE

    def branch_guidance(self, given: Mapping[str, Any], guidance_scale: float) -> float:
        """The scale of the difference between the branches; 1 or less is none."""
        return guidance_scale

    def scalars(self, given: Mapping[str, Any], guidance_scale: float) -> Tensors:
        """What else a call says in numbers: `guidance_rescale`, 0 where the caller is silent."""
        if "guidance_rescale" not in self.inputs:
            return {}
        return {"guidance_rescale": self.scalar(real_number("guidance_rescale", given.get("guidance_rescale", 0.0)))}

    def scalar(self, value: float) -> torch.Tensor:
        """float32 [1] on the artifact's device."""
        return torch.full([1], value, dtype=torch.float32, device=self._device)

    def negatives(self, given: Mapping[str, Any], count: int) -> list[Tensors]:
        """What to guide away from, for each of `count` prompts: one may stand for all, and none is an empty text."""
        zero = self.settings.text.zero_negative
        negatives = self._text(given, "negative_", None if zero else "") or [self._text.zeros()]
        if len(negatives) not in (1, count):
            raise RequestError(f"negative_prompt: expected one, or {count}, one for each prompt; got {len(negatives)}")
        return negatives * (count // len(negatives))


def artifact_families(artifact: Artifact) -> tuple[Family, ...]:
    """The artifact's family at each of its sizes, the default first. Raises ArtifactError for one that is not known, settings that
    are not to its schema, and graphs that a call of it does not fit."""
    kind = family_class(artifact)
    families = tuple(kind(artifact, size) for size in (None, *artifact.manifest.sizes))
    for family in families:
        raise_problems(
            artifact.folder, (f"manifest.json {problem}; export again" for problem in call_problems(artifact, family))
        )
    return families


def family_class(artifact: Artifact) -> type[Family]:
    """The class of the artifact's family. Raises ArtifactError for one that is not known."""
    name = artifact.manifest.family
    if name not in FAMILY_CLASSES:
        raise ArtifactError(
            f"{artifact.folder}: manifest.json [family]: {name!r} is not one that this runtime replays: {', '.join(FAMILY_CLASSES)}; "
            "install the prebake that wrote it, or export again with this one"
        )
    return getattr(importlib.import_module(f".{name}", __name__), FAMILY_CLASSES[name])


def denoiser_inputs(artifact: Artifact) -> frozenset[str]:
    """The names of what the denoiser's graphs take."""
    return frozenset(s.name for variant in artifact.variants.values() for s in variant.graph.inputs)


def read_settings(kind: type[SettingsT], artifact: Artifact, size: SizeEntry | None = None) -> SettingsT:
    """`manifest.pipeline`, with what of it is another at that size, checked. Raises ArtifactError naming the first field that is
    wrong."""
    try:
        return kind.model_validate({**artifact.manifest.pipeline, **(size.pipeline if size else {})})
    except ValidationError as e:
        where = f"sizes.{size.name}.pipeline" if size else "pipeline"
        raise ArtifactError(
            f"{describe_schema_error(artifact.folder / 'manifest.json', e, where)}; export again"
        ) from e
