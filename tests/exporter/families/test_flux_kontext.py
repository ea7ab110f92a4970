"""FLUX.1 Kontext: the picture that the model looks at, against diffusers' pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

from prebake.exporter.families import flux_kontext
from prebake.exporter.families.picture import Size, example_picture
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.settle import has_picture_input
from prebake.runtime.errors import ExportError, RecipeError, RequestError
from support.family_parity import PICTURE, PROMPTS, TOLERANCE, eager, expected, got, ours, relative_error, seeded

NAME = "flux-kontext"
GUIDED = ("guidance.true_cfg=true",)
OTHER = example_picture(Size(32, 32, 0), 4)
works = pytest.mark.works(NAME, "reference picture")


@works
def test_the_picture_is_looked_at():
    latents = expected(NAME, PROMPTS[0], generator=seeded(1))
    other = expected(NAME, PROMPTS[0], generator=seeded(1), image=OTHER)
    assert relative_error(other, latents) > 0.01  # else the next two would say nothing
    assert relative_error(got(NAME, PROMPTS[0], seed=1, image=OTHER), other) < TOLERANCE
    assert relative_error(got(NAME, PROMPTS[0], seed=1, image=PICTURE), latents) < TOLERANCE


@works
@pytest.mark.parametrize("each", [False, True], ids=["one generator", "a generator each"])
@pytest.mark.parametrize("image", [PICTURE, [PICTURE, OTHER]], ids=["one picture", "a picture each"])
def test_batches(image, each):
    call = {"image": image, "num_images_per_prompt": 2}
    latents = expected(NAME, list(PROMPTS[:2]), generator=[seeded(i) for i in range(4)] if each else seeded(1), **call)
    generator = [seeded(i) for i in range(4)] if each else seeded(1)
    assert len(latents) == 4
    assert relative_error(got(NAME, list(PROMPTS[:2]), generator=generator, **call), latents) < TOLERANCE


@works
@pytest.mark.parametrize("latents", [None, torch.randn(1, 64, 16, generator=seeded(7))], ids=["drawn", "given"])
def test_latents_may_stand_for_the_picture(latents):
    call = {"image": torch.randn(1, 4, 16, 16, generator=seeded(3)), "latents": latents}
    expected_ = expected(NAME, PROMPTS[0], generator=seeded(1), **call)
    assert relative_error(got(NAME, PROMPTS[0], seed=1, **call), expected_) < TOLERANCE


@works
def test_a_picture_of_the_same_proportions_is_resized_as_diffusers_does(monkeypatch):
    """Diffusers picks the nearest of its sizes; here that is the artifact's own."""
    from diffusers.pipelines.flux import pipeline_flux_kontext

    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 64), (32, 32), (64, 16)])
    large = example_picture(Size(75, 80, 0), 5)
    latents = expected(NAME, PROMPTS[0], generator=seeded(1), image=large, _auto_resize=True)
    assert relative_error(got(NAME, PROMPTS[0], seed=1, image=large), latents) < TOLERANCE


@pytest.mark.works(NAME, "true guidance")
@pytest.mark.parametrize("branches", ["sequential", "batched"])
def test_true_guidance(branches):
    call = {"negative_prompt": "blurry", "negative_prompt_2": "low quality", "true_cfg_scale": 3.0}
    latents = expected(NAME, PROMPTS[0], generator=seeded(1), **call)
    drawn = got(NAME, PROMPTS[0], *GUIDED, f"guidance.branches={branches}", seed=1, **call)
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(got(NAME, PROMPTS[0], *GUIDED, seed=1), latents) > 0.01  # the canary: without it


@pytest.mark.parametrize("width_height", PREFERRED_KONTEXT_RESOLUTIONS, ids="{0[0]} x {0[1]}".format)
def test_every_size_of_kontext_can_be_exported(width_height):
    """At each of them diffusers takes a picture of these proportions to this size and no other, as the docs say."""
    width, height = width_height
    _, w, h = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    assert (w, h) == (width, height)
    flux_kontext.check_size(eager(NAME), Size(height, width, 512))


def test_the_reference_is_the_plain_diffusers_call():
    """What an export is held against, for the picture that the seed stands for."""
    size = Size(32, 32, 16)
    latents, image = flux_kontext.draw(eager(NAME), PROMPTS[0], 3, 8, 3.5, size)
    drawn = ours(NAME)(PROMPTS[0], seed=3, image=example_picture(size, 3), output_type="latent")[0]
    assert relative_error(drawn, latents) < TOLERANCE
    assert image.shape == (1, 3, 32, 32)


REFUSED = {
    "no picture": (
        {"image": None},
        "image: expected a picture to begin with, got none; this model draws nothing without",
    ),
    "strength": (
        {"strength": 0.5},
        "strength: this model looks at the image and starts from noise; leave the argument out",
    ),
    "mask": ({"mask_image": PICTURE}, "mask_image: artifacts of this family do not take it"),
    "max_area": (
        {"max_area": 1024},
        "max_area: an artifact of FluxKontextPipeline does not take it; it takes prompt, prompt_2, prompt_embeds, "
        "pooled_prompt_embeds",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_calls(case):
    call, sentence = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        got(NAME, "snow", **call)
    assert str(caught.value).startswith(sentence)


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ExportError, match=r"multiples of 4 .* got 32 x 30; the nearest are 32 x 32"):
        flux_kontext.check_size(eager(NAME), Size(32, 30, 16))


def test_there_is_no_strength_to_export_for():
    with pytest.raises(RecipeError, match=r"sampler\.image_to_image: .* start from noise alone"):
        has_picture_input(resolve("flux-kontext-fast", ("sampler.image_to_image=true",)), flux_kontext)
    assert has_picture_input(resolve("flux-kontext-fast"), flux_kontext)
