"""Every family offers what `Family` says, under the same names, and both sides list the same families."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import pytest

from prebake.exporter.denoiser_alone.observation import pipeline_request
from prebake.exporter.denoiser_alone.recording import record_pipeline
from prebake.exporter.families.picture import Size
from prebake.exporter.families.registry import (
    BASE_CLASSES,
    FAMILIES,
    Family,
    as_base_pipeline,
    find_family,
    load_family,
)
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.settle import component_dtypes, load_pipeline
from prebake.exporter.tiny import TINY_MODELS, build_tiny_pipeline
from prebake.runtime.errors import ExportError
from prebake.runtime.families import FAMILY_CLASSES

FUNCTIONS = {name: f for name, f in vars(Family).items() if inspect.isfunction(f) and not name.startswith("_")}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_every_function_with_the_same_arguments(name):
    family = load_family(name)
    for function, declared in FUNCTIONS.items():
        expected = [p for p in inspect.signature(declared).parameters if p != "self"]
        assert list(inspect.signature(getattr(family, function)).parameters) == expected, function
    assert family.PICTURE is None or "role" in family.PICTURE or "strength" in family.PICTURE


def test_there_is_something_to_hold_them_to():
    """The canary of the test above."""
    assert {"denoiser", "other_components", "draw"} <= FUNCTIONS.keys()


def test_both_sides_and_the_tiny_models_know_the_same_families():
    assert set(FAMILIES) == set(FAMILY_CLASSES)
    assert {model.module for model in TINY_MODELS.values()} - {"sdxl_refiner"} == set(FAMILIES)


def test_no_pipeline_has_two_families():
    classes = [c for classes in FAMILIES.values() for c in classes]
    assert len(classes) == len(set(classes))


# --- pipelines that draw with a picture, of a family's components ---------------------------------------------------


def as_class(tiny: str, kind: str, **more: Any) -> Any:
    """The tiny pipeline's components in another of diffusers' classes."""
    pipe = build_tiny_pipeline(tiny)
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    given = {**dict(pipe.config), **pipe.components, **more}
    return getattr(diffusers, kind)(**{name: given[name] for name in known if name in given})


RECIPES = {"FluxPipeline": ("flux", "flux-fast"), "StableDiffusionPipeline": ("sd", "sd-fast"),
           "StableDiffusion3Pipeline": ("sd3", "sd3-fast"), "StableDiffusionXLPipeline": ("sdxl", "sdxl-fast")}  # fmt: skip


def test_no_class_that_draws_with_a_picture_is_forgotten():
    """Of each family's class, those that diffusers has beside it; one for FLUX Kontext draws otherwise, and is refused as any
    pipeline without a family is."""
    stems = {c.removesuffix("Pipeline").removesuffix("Img2Img") for classes in FAMILIES.values() for c in classes}
    kinds = {f"{stem}{kind}Pipeline" for stem in stems for kind in ("Img2Img", "Inpaint")}
    there = {kind for kind in kinds if hasattr(diffusers, kind)}
    taken = {c for classes in FAMILIES.values() for c in classes} | BASE_CLASSES.keys()
    assert there - taken == {"FluxKontextInpaintPipeline"}
    assert BASE_CLASSES.keys() <= there


@pytest.mark.parametrize("kind", BASE_CLASSES)
def test_a_folder_of_such_a_pipeline_is_exported_as_its_family_is(kind, tmp_path):
    base = BASE_CLASSES[kind]
    tiny, name = RECIPES[base]
    folder = tmp_path / kind
    as_class(tiny, kind, requires_safety_checker=False).save_pretrained(folder)
    plain = resolve(name, ("sampler.image_to_image=false",), str(folder))
    with pytest.warns(UserWarning, match=f"{kind} is exported as {base}, .+image_to_image=true"):
        loaded = load_pipeline(plain, component_dtypes(plain))
    assert type(loaded.pipe).__name__ == loaded.source.pipeline == base
    assert find_family(loaded.pipe) is load_family(tiny)
    before = build_tiny_pipeline(tiny)
    assert all((loaded.pipe.components[n] is None) == (part is None) for n, part in before.components.items())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is exported as")
        recipe = resolve(name, ("sampler.image_to_image=true",), str(folder))
        load_pipeline(recipe, component_dtypes(recipe))


def test_one_that_was_trained_as_the_refiner_is_exported_as_that():
    pipe = as_class("sdxl-refiner", "StableDiffusionXLInpaintPipeline", requires_aesthetics_score=True)
    base = as_base_pipeline(pipe)
    assert type(base).__name__ == "StableDiffusionXLImg2ImgPipeline"
    assert base.config.requires_aesthetics_score
    assert base.unet is pipe.unet


def test_a_unet_that_sees_the_mask_is_refused_in_a_sentence():
    pipe = as_class("sd", "StableDiffusionInpaintPipeline", requires_safety_checker=False)
    pipe.unet = diffusers.UNet2DConditionModel(**{**pipe.unet.config, "in_channels": 9})
    base = as_base_pipeline(pipe)
    with pytest.raises(ExportError, match=r"in_channels: expected 4 .+ got 9: UNets that see a picture"):
        find_family(base).check_size(base, Size(32, 32, base.tokenizer.model_max_length))


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_a_pipeline_that_cannot_be_called_with_a_prompt_alone_is_refused_in_a_sentence(kind):
    """Where its denoiser alone is asked for, or where no family takes it."""
    pipe = as_class("sd", kind, requires_safety_checker=False)
    with pytest.raises(ExportError, match=rf"^{kind}: could not be called .+ which no recipe can give") as refused:
        record_pipeline(pipe, pipeline_request(pipe, "a red circle", {"height": 32}, {}), (2,))
    assert "\n" not in str(refused.value)
    assert "forward" not in vars(pipe.unet)
