"""Families: what an exporter has to know of one kind of diffusers pipeline, and which family is for which pipeline.

A family is a module here and one of the same name in `runtime/families`, a line in `FAMILIES` and one in the runtime's
`FAMILY_CLASSES`, and nothing else. What a module here has to offer is `Family`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from ...runtime.errors import ExportError
from .picture import Size

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..recipe.schema import Guidance
    from ..sites.component import Component

FAMILIES = {
    "cogvideox": ("CogVideoXPipeline",),
    "flux": ("FluxPipeline",),
    "flux_kontext": ("FluxKontextPipeline",),
    "pixart": ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    "sd": ("StableDiffusionPipeline",),
    "sd3": ("StableDiffusion3Pipeline",),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"),
}
"""Family -> the classes of its pipelines."""
BASE_CLASSES = {
    "FluxImg2ImgPipeline": "FluxPipeline",
    "FluxInpaintPipeline": "FluxPipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}
"""Classes that have the components of a family's, and draw with a picture: the family's artifacts do that too, where
`sampler.image_to_image` says so."""


class Family(Protocol):
    """`pipe` is a loaded pipeline of the family. `PICTURE` is what `runtime/families`' `PictureInput` says besides its size;
    None where no pipeline begins from a picture or looks at one."""

    PICTURE: Mapping[str, Any] | None

    def defaults(self, pipe: Any) -> dict[str, Any]:
        """What the pipeline's call takes where its caller is silent: sizes, steps and guidance."""
        ...

    def check_size(self, pipe: Any, size: Size) -> None:
        """Raises ExportError for a size that the pipeline would not draw, and for a model that cannot be exported."""
        ...

    def check_steps(self, pipe: Any, steps: int) -> None:
        """Raises ExportError for a number of steps that the pipeline does in another way."""
        ...

    def denoiser(self, pipe: Any, size: Size, guidance: Guidance = ...) -> Component:
        """The denoiser with all its branches behind named flat inputs, with example tensors of that size."""
        ...

    def range_unit(self, pipe: Any) -> int:
        """Pixels that both sides are multiples of at every size that one graph can be for. Raises ExportError for a family whose graphs
        are for one size."""
        ...

    def range_denoiser(self, pipe: Any, size: Size, guidance: Guidance = ...) -> Component:
        """`denoiser` for every size of a range: what follows the size is among its inputs. Examples are of that size."""
        ...

    def range_components(
        self, pipe: Any, size: Size, *, channels_last: bool, picture: bool = False
    ) -> tuple[Component, ...]:
        """`other_components` for every size of a range. Their decoder takes latents [1, C, h, w]."""
        ...

    def other_components(
        self, pipe: Any, size: Size, *, channels_last: bool, picture: bool = False
    ) -> tuple[Component, ...]:
        """What else a picture needs: text encoders, with `picture` the VAE's encoder, and its decoder last."""
        ...

    def scheduler_arguments(self, scheduler: Any, latents_shape: Sequence[int], steps: int) -> dict[str, Any]:
        """What the pipeline passes to `set_timesteps` besides the number of steps. Raises ExportError for a scheduler that it
        cannot have."""
        ...

    def prompt_entries(self, pipe: Any, size: Size) -> list[dict[str, Any]]:
        """The manifest's entry for each tokenizer (`text.prompt_entry`)."""
        ...

    def facts(self, pipe: Any, size: Size) -> dict[str, Any]:
        """The manifest's `pipeline` table, which `runtime/families` validates and drives."""
        ...

    def encode(
        self, pipe: Any, size: Size, prompt: str, guidance_scale: float, guidance: Guidance = ...
    ) -> dict[str, Tensor]:
        """The denoiser's inputs that are equal at every step, from the pipeline's own encoders."""
        ...

    def noise(self, pipe: Any, size: Size, generator: Generator) -> Tensor:
        """Standard normal latents of one picture as the loop has them, the numbers that the pipeline draws."""
        ...

    def draw(
        self, pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size
    ) -> tuple[Tensor, Tensor]:
        """Final latents, and image or frames in 0..1, of the plain diffusers call: what an artifact is held against."""
        ...


def as_base_pipeline(pipe: Any) -> Any:
    """The pipeline itself, or another around its components, of the class that its family is exported with."""
    name = BASE_CLASSES.get(type(pipe).__name__)
    if name is None:
        return pipe
    import diffusers

    if pipe.config.get("requires_aesthetics_score"):  # trained as SDXL's refiner
        name = "StableDiffusionXLImg2ImgPipeline"
    kind = getattr(diffusers, name)
    given = {**dict(pipe.config), **pipe.components}
    return kind(**{name: given[name] for name in inspect.signature(kind.__init__).parameters if name in given})


def family_name(pipe: Any) -> str | None:
    """The family of a pipeline, None where it has none."""
    return next((name for name, classes in FAMILIES.items() if type(pipe).__name__ in classes), None)


def find_family(pipe: Any) -> Family:
    """The family's module of a pipeline. Raises ExportError with those that exist."""
    if name := family_name(pipe):
        return load_family(name)
    raise ExportError(
        f'pipeline {type(pipe).__name__} has no family here: its denoiser alone can be exported, which model.part = "denoiser" says; '
        f"pipelines with one: {', '.join(sorted(c for classes in FAMILIES.values() for c in classes))}"
    )


def load_family(name: str) -> Family:
    """The family of that name, as a manifest has it."""
    return cast(Family, importlib.import_module(f".{name}", __package__))
