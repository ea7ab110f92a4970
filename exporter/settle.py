"""Settle: sizes, steps, dtypes and the scheduler of an export."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from ..runtime.errors import ExportError, RecipeError, first_line
from ..runtime.manifest import Defaults
from ..runtime.sizes.size_range import SideRange, SizeRange
from .capture.ranges import refuse_one_unit
from .families.picture import Size
from .families.registry import Family, as_base_pipeline
from .load import source
from .load.lora import cast_components, fuse_loras
from .load.textual_inversion import add_inversions
from .plan import SizeSchedules
from .plan.areas import tabulate_areas
from .plan.sampler import SchedulerTable, tabulate_scheduler, tabulate_tails
from .progress import Progress
from .recipe.resolve import Recipe
from .rewrite import DENOISER_COMPONENTS


def component_dtypes(recipe: Recipe) -> dict[str, torch.dtype]:
    """Component -> dtype, as `from_pretrained(torch_dtype=...)` takes it; those that a pipeline lacks are passed over."""
    of = recipe.precision
    names = {
        **dict.fromkeys(DENOISER_COMPONENTS, of.denoiser),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), of.text_encoders),
        "vae": of.vae,
    }
    return {"default": torch.float32, **{component: getattr(torch, name) for component, name in names.items()}}


def settle(recipe: Recipe, family: Family, loaded: source.LoadedPipeline) -> tuple[Defaults, Size, tuple[int, ...]]:
    """The default size, steps and guidance: the recipe's word, else the model's own default, else the family's."""
    usual = {**family.defaults(loaded.pipe), **loaded.defaults}
    asked = {**recipe.shapes.model_dump(), "guidance_scale": recipe.sampler.guidance_scale}
    if recipe.shapes.pixels:
        asked["height"], asked["width"] = recipe.shapes.pixels[0]
    asked |= {
        name: default_length(getattr(recipe.shapes, name), usual[name])
        for name in ("height", "width")
        if recipe.shapes.is_ranged
    }
    chosen = {name: usual[name] if asked.get(name) is None else asked[name] for name in usual}
    steps = recipe.sampler.steps or (usual["num_inference_steps"],)
    frames = chosen.get("num_frames")
    size = Size(chosen["height"], chosen["width"], chosen["max_sequence_length"], frames or 1)
    family.check_size(loaded.pipe, size)
    for n in steps:
        family.check_steps(loaded.pipe, n)
    defaults = Defaults(
        num_inference_steps=steps[0],
        guidance_scale=float(chosen["guidance_scale"]),
        height=size.height,
        width=size.width,
        num_frames=frames,
    )
    return defaults, size, steps


def default_length(asked: int | SideRange | None, usual: int) -> int:
    """What a call gets that does not say: of a range the length nearest to the model's own."""
    return asked.nearest(usual)[0] if isinstance(asked, SideRange) else asked or usual


def settle_range(recipe: Recipe, family: Family, pipe: Any, size: Size) -> SizeRange | None:
    """The recipe's range, None where it has none; `size` is the default one. Raises ExportError for a family that has no graph for
    several sizes, and for sizes that the pipeline would not draw."""
    if not recipe.shapes.is_ranged:
        return None
    unit, sides = family.range_unit(pipe), {}
    for name in ("height", "width"):
        asked = getattr(recipe.shapes, name)
        sides[name] = asked if isinstance(asked, SideRange) else SideRange.of_length(getattr(size, name))
        if sides[name].unit % unit:
            raise ExportError(
                f"shapes.{name}: expected min and step to be multiples of {unit} pixels, which the denoiser needs at every size, got "
                f"{sides[name]}; set step={max(1, round(sides[name].step / unit)) * unit}, and min to such a multiple"
            )
        refuse_one_unit(name, sides[name])
    legal = SizeRange(**sides)
    for height, width in legal.corners:
        family.check_size(pipe, replace(size, height=height, width=width))
    return legal


def area_tables(
    recipe: Recipe, family: Family, pipe: Any, size: Size, legal: SizeRange | None, steps: tuple[int, ...]
) -> dict[int, SizeSchedules]:
    """The scheduler's tables at each area of the range but the default size's; none where they do not follow the size."""

    def tabulate(height: int, width: int) -> SizeSchedules:
        of = replace(size, height=height, width=width)
        tables = {n: tabulate_scheduler(pipe.scheduler, n, **schedule_arguments(family, pipe, of, n)) for n in steps}
        return SizeSchedules(tables, {n: sampler_tails(recipe, family, pipe, of, n) for n in steps})

    return tabulate_areas(legal, size.height * size.width, tabulate)


def further_sizes(recipe: Recipe, family: Family, pipe: Any, size: Size) -> dict[str, Size]:
    """The recipe's sizes besides its first, `size`, by name. Raises ExportError for one that the pipeline would not draw."""
    others = [replace(size, height=height, width=width) for height, width in recipe.shapes.pixels[1:]]
    for other in others:
        family.check_size(pipe, other)
    return {f"{other.width}x{other.height}": other for other in others}


def load_pipeline(recipe: Recipe, dtypes: dict[str, torch.dtype], model: str | None = None) -> source.LoadedPipeline:
    """The recipe's pipeline, read from `model` if that is where it lies, with the recipe's textual inversions, LoRAs and
    scheduler, and no progress bar."""
    place = model or recipe.model.id
    whole = {"default": torch.float32} if recipe.model.lora else dtypes
    loaded = source.load_model(place, recipe.model.revision, whole, recipe.model.config)
    inversions = add_inversions(loaded.pipe, recipe.model.textual_inversion, place)
    loras = fuse_loras(loaded.pipe, recipe.model.lora, place)
    if loras:
        cast_components(loaded.pipe, dtypes)
    loaded = replace(loaded, source=loaded.source.model_copy(update={"loras": loras, "inversions": inversions}))
    if recipe.model.part != "denoiser":
        loaded = take_base_pipeline(recipe, loaded)
    loaded.pipe.set_progress_bar_config(disable=True)
    set_scheduler(loaded.pipe, recipe.sampler.scheduler)
    return loaded


def take_base_pipeline(recipe: Recipe, loaded: source.LoadedPipeline) -> source.LoadedPipeline:
    """The pipeline as its family is exported. A warning says so of one that draws with a picture, where no artifact of it would."""
    pipe = as_base_pipeline(loaded.pipe)
    if pipe is loaded.pipe:
        return loaded
    name = type(pipe).__name__
    if not recipe.sampler.image_to_image and name != "StableDiffusionXLImg2ImgPipeline":
        warnings.warn(
            f"model {recipe.model.id!r}: {type(loaded.pipe).__name__} is exported as {name}, whose components it has; "
            "set sampler.image_to_image=true for calls with image and mask_image",
            stacklevel=3,
        )
    return replace(loaded, pipe=pipe, source=loaded.source.model_copy(update={"pipeline": name}))


def set_scheduler(pipe: Any, name: str) -> None:
    """Gives the pipeline the diffusers scheduler of that name, made from its own one's configuration."""
    if name != "model":
        pipe.scheduler = build_scheduler(name, pipe.scheduler.config)


def build_scheduler(name: str, config: Any) -> Any:
    """The diffusers scheduler of that name. Raises RecipeError where the configuration is none for it."""
    import diffusers

    try:
        return getattr(diffusers, name).from_config(config)
    except Exception as e:  # they raise whatever their arithmetic runs into
        raise RecipeError(
            f"sampler.scheduler: {name} cannot be made from the model's scheduler configuration ({first_line(e)}); take another one"
        ) from e


def sampler_table(family: Family, pipe: Any, size: Size, steps: int, progress: Progress) -> SchedulerTable:
    progress.announce(f"{type(pipe.scheduler).__name__}, {steps} steps")
    return tabulate_scheduler(pipe.scheduler, steps, **schedule_arguments(family, pipe, size, steps))


def schedule_arguments(family: Family, pipe: Any, size: Size, steps: int) -> dict[str, Any]:
    """The keyword arguments that the pipeline passes to its scheduler besides the number of steps."""
    return family.scheduler_arguments(pipe.scheduler, family.facts(pipe, size)["latents_shape"], steps)


def sampler_tails(recipe: Recipe, family: Family, pipe: Any, size: Size, steps: int) -> dict[int, SchedulerTable]:
    """The schedules that begin in the middle, by the number of steps that they leave out; none without pictures to begin
    from."""
    if not recipe.sampler.image_to_image:
        return {}
    return tabulate_tails(pipe.scheduler, steps, **schedule_arguments(family, pipe, size, steps))


def has_picture_input(recipe: Recipe, family: Family) -> bool:
    """True if the artifact needs the VAE's encoder. Raises RecipeError where a family has no use for it."""
    picture = family.PICTURE
    if recipe.sampler.image_to_image and (picture is None or picture.get("role") == "reference"):
        raise RecipeError("sampler.image_to_image: this family's pipelines start from noise alone; leave the key out")
    return picture is not None and (recipe.sampler.image_to_image or picture.get("required", False))
