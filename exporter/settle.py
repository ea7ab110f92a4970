"""Settle: sizes, steps, dtypes and the scheduler of an export."""

from __future__ import annotations

from typing import Any

import torch

from ..runtime.errors import RecipeError
from ..runtime.manifest import Defaults
from .load import source
from .lower import load_backend
from .plan.sampler import SchedulerTable, tabulate_scheduler, tabulate_tails
from .progress import Progress
from .recipe.resolve import Recipe
from .rewrite import DENOISER_NAMES


def component_dtypes(recipe: Recipe) -> dict[str, torch.dtype]:
    """Component -> dtype, as `from_pretrained(torch_dtype=...)` takes it; those that a pipeline lacks are passed over."""
    of = recipe.precision
    names = {
        **dict.fromkeys(DENOISER_NAMES, of.denoiser),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), of.text_encoders),
        "vae": of.vae,
    }
    return {"default": torch.float32, **{component: getattr(torch, name) for component, name in names.items()}}


def settle(recipe: Recipe, family: Any, loaded: source.LoadedPipeline) -> tuple[Defaults, Any, tuple[int, ...]]:
    """Sizes, steps and guidance: the recipe's word, else the model's own default, else the family's."""
    usual = {**family.defaults(loaded.pipe), **loaded.defaults}
    asked = {**recipe.shapes.model_dump(), "guidance_scale": recipe.sampler.guidance_scale}
    chosen = {name: usual[name] if asked.get(name) is None else asked[name] for name in usual}
    steps = recipe.sampler.steps or (usual["num_inference_steps"],)
    frames = chosen.get("num_frames")
    size = family.Size(chosen["height"], chosen["width"], chosen["max_sequence_length"], frames or 1)
    family.check_size(loaded.pipe, size)
    if check_steps := getattr(family, "check_steps", None):
        for n in steps:
            check_steps(loaded.pipe, n)
    defaults = Defaults(
        num_inference_steps=steps[0],
        guidance_scale=float(chosen["guidance_scale"]),
        height=size.height,
        width=size.width,
        num_frames=frames,
    )
    return defaults, size, steps


def set_scheduler(pipe: Any, name: str) -> Any:
    """The pipeline with the named diffusers scheduler made from its own one's configuration."""
    if name != "model":
        import diffusers

        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    return pipe


def sampler_table(family: Any, pipe: Any, size: Any, steps: int, progress: Progress) -> SchedulerTable:
    progress.announce(f"{type(pipe.scheduler).__name__}, {steps} steps")
    return tabulate_scheduler(pipe.scheduler, steps, **schedule_arguments(family, pipe, size, steps))


def schedule_arguments(family: Any, pipe: Any, size: Any, steps: int) -> dict[str, Any]:
    """The keyword arguments that the pipeline passes to its scheduler besides the number of steps."""
    return family.scheduler_arguments(pipe.scheduler, family.facts(pipe, size)["latents_shape"], steps)


def sampler_tails(recipe: Recipe, family: Any, pipe: Any, size: Any, steps: int) -> dict[int, SchedulerTable]:
    """The schedules that begin in the middle, by the number of steps that they leave out; none without pictures to begin
    from."""
    if not recipe.sampler.image_to_image:
        return {}
    return tabulate_tails(pipe.scheduler, steps, **schedule_arguments(family, pipe, size, steps))


def has_channels_last_vae(recipe: Recipe) -> bool:
    """True if the VAE's weights lie as N H W C."""
    return recipe.compile.channels_last_vae and load_backend(recipe.compile.backend).CHANNELS_LAST


def has_picture_input(recipe: Recipe, family: Any) -> bool:
    """True if the artifact needs the VAE's encoder. Raises RecipeError where a family has no use for it."""
    picture = getattr(family, "PICTURE", None)
    if recipe.sampler.image_to_image and (picture is None or picture.get("role") == "reference"):
        raise RecipeError("sampler.image_to_image: this family's pipelines start from noise alone; leave the key out")
    return picture is not None and (recipe.sampler.image_to_image or picture.get("required", False))
