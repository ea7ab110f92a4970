"""FLUX: pictures to begin from, guidance between two prompts, and what both refuse; against diffusers' pipelines."""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch
from diffusers import FluxImg2ImgPipeline

from prebake.exporter.families import flux
from prebake.exporter.families.picture import Size, example_picture
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.settle import has_picture_input
from prebake.runtime.errors import ExportError, RecipeError, RequestError
from support.captured_pipeline import prepared
from support.family_parity import (
    FLOAT32,
    PICTURE,
    PROMPTS,
    TOLERANCE,
    as_kind,
    eager,
    expected,
    got,
    ours,
    relative_error,
    seeded,
)

PICTURES = ("sampler.image_to_image=true",)
GUIDED = ("guidance.true_cfg=true",)
TWO = list(PROMPTS[:2])
OTHER = example_picture(Size(32, 32, 0), 4)
NEGATIVE = {"negative_prompt": "blurry", "true_cfg_scale": 4.0}

works_pictures = pytest.mark.works("flux", "image to image")
works_guidance = pytest.mark.works("flux", "true guidance")


@functools.cache
def beginner(tiny: str) -> FluxImg2ImgPipeline:
    """diffusers' image-to-image."""
    return as_kind(FluxImg2ImgPipeline, eager(tiny))


def from_picture(prompt, *, image=PICTURE, **call) -> torch.Tensor:
    """diffusers' latents of image-to-image, eight steps."""
    pipe = beginner("flux")
    size = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 3.5}
    return pipe(prompt, image=image, output_type="latent", **{**size, **call})[0]


# --- image to image ---------------------------------------------------------------------------------------------------


@works_pictures
@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
def test_a_picture_to_begin_from(strength):
    latents = from_picture(PROMPTS[0], strength=strength, generator=seeded(1))
    draw = partial(got, "flux", PROMPTS[0], *PICTURES, strength=strength)
    assert relative_error(draw(image=PICTURE, seed=1), latents) < TOLERANCE
    assert relative_error(draw(image=PICTURE, seed=2), latents) > 0.1  # the canaries: other noise
    if strength < 1:
        assert relative_error(draw(image=OTHER, seed=1), latents) > 0.01  # another picture


@works_pictures
def test_the_usual_strength_is_that_of_diffusers():
    latents = from_picture(PROMPTS[0], generator=seeded(1))
    assert relative_error(got("flux", PROMPTS[0], *PICTURES, image=PICTURE, seed=1), latents) < TOLERANCE


@works_pictures
@pytest.mark.parametrize("image", [PICTURE, [PICTURE, OTHER]], ids=["one picture", "a picture each"])
@pytest.mark.parametrize("each", [False, True], ids=["one generator", "a generator each"])
def test_batches_of_pictures(image, each):
    generators = [seeded(1), seeded(2)] if each else seeded(1)
    latents = from_picture(TWO, image=image, strength=0.5, generator=generators)
    generators = [seeded(1), seeded(2)] if each else seeded(1)
    drawn = got("flux", TWO, *PICTURES, image=image, strength=0.5, generator=generators)
    assert relative_error(drawn, latents) < TOLERANCE


@works_pictures
def test_several_images_of_each_prompt():
    call = {"image": PICTURE, "strength": 0.5, "num_images_per_prompt": 2}
    latents = from_picture(TWO, generator=seeded(1), **call)
    assert len(latents) == 4
    assert relative_error(got("flux", TWO, *PICTURES, seed=1, **call), latents) < TOLERANCE


@works_pictures
def test_schnell_has_other_steps():
    pipe = beginner("flux-schnell")
    call = {"image": PICTURE, "strength": 0.5}
    size = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 4}
    latents = pipe(PROMPTS[0], output_type="latent", generator=seeded(1), **size, **call)[0]
    assert relative_error(got("flux-schnell", PROMPTS[0], *PICTURES, seed=1, **call), latents) < TOLERANCE


@works_pictures
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_a_picture_of_another_size_is_resized_as_diffusers_does(kind):
    large = example_picture(Size(50, 70, 0), 5)
    tensor = torch.tensor(list(large.tobytes())).reshape(50, 70, 3) / 255
    image = {"pil": large, "np": tensor.numpy()[None], "pt": tensor.permute(2, 0, 1)[None]}[kind]
    latents = from_picture(PROMPTS[0], image=image, strength=0.5, generator=seeded(1))
    assert relative_error(got("flux", PROMPTS[0], *PICTURES, image=image, strength=0.5, seed=1), latents) < TOLERANCE


@works_pictures
def test_latents_may_stand_for_the_picture():
    latents = torch.randn(1, 4, 16, 16, generator=seeded(3))
    call = {"image": latents, "strength": 0.5}
    expected_ = from_picture(PROMPTS[0], generator=seeded(1), **call)
    assert relative_error(got("flux", PROMPTS[0], *PICTURES, seed=1, **call), expected_) < TOLERANCE


@works_pictures
def test_the_same_artifact_draws_from_noise_alone():
    latents = expected("flux", PROMPTS[0], generator=seeded(1))
    assert relative_error(got("flux", PROMPTS[0], *PICTURES, seed=1), latents) < TOLERANCE


def test_a_callback_counts_the_steps_that_are_taken():
    seen: list[tuple[int, float]] = []
    theirs: list[tuple[int, float]] = []

    def ours_(pipe, step, timestep, tensors):
        seen.append((step, float(timestep)))

    def eager_(pipe, step, timestep, tensors):
        theirs.append((step, float(timestep)))
        return {}

    _ = got("flux", "snow", *PICTURES, image=PICTURE, strength=0.5, seed=1, callback_on_step_end=ours_)
    _ = from_picture("snow", strength=0.5, generator=seeded(1), callback_on_step_end=eager_)
    assert len(seen) == 4
    assert [step for step, _ in seen] == [step for step, _ in theirs]
    # the plan has the scheduler's timesteps in float64, eager in float32
    assert [timestep for _, timestep in seen] == pytest.approx([timestep for _, timestep in theirs], rel=1e-6)


@works_pictures
@pytest.mark.works("flux", "caches")
def test_a_cached_plan_begins_in_the_middle(monkeypatch):
    """As diffusers' pipeline whose transformer says again what it said last where the mask has a 0; but where the call
    begins everything is computed."""
    mask = "11010101"
    cache = (
        f"cache.mask={mask}",
        "cache.order=0",
        "cache.site=output",
        "cache.method=mask",
        "verify.cached_psnr_db=20",
    )
    transformer = eager("flux").transformer
    forward, last, computed = transformer.forward, {}, []

    def masked(*args, **kwargs):
        e = 8 - steps + len(computed)
        computed.append(e == 8 - steps or mask[e] == "1")
        if computed[-1]:
            last["output"] = forward(*args, **kwargs)
        return last["output"]

    for strength, steps in ((0.75, 6), (0.625, 5)):
        computed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "forward", masked)
            latents = from_picture(PROMPTS[0], strength=strength, generator=seeded(1))
        call = {"image": PICTURE, "strength": strength, "seed": 1}
        assert len(computed) == steps
        assert sum(computed) < steps
        assert relative_error(got("flux", PROMPTS[0], *PICTURES, *cache, **call), latents) < TOLERANCE
        uncached = got("flux", PROMPTS[0], *PICTURES, *cache, cache=False, **call)
        assert relative_error(uncached, latents) > 1e-3  # the canary
        assert relative_error(uncached, got("flux", PROMPTS[0], *PICTURES, **call)) < TOLERANCE


# --- true guidance ----------------------------------------------------------------------------------------------------


@works_guidance
@pytest.mark.parametrize("branches", ["sequential", "batched"])
def test_true_guidance(branches):
    overrides = (*GUIDED, f"guidance.branches={branches}")
    latents = expected("flux", PROMPTS[0], generator=seeded(1), **NEGATIVE)
    assert relative_error(got("flux", PROMPTS[0], *overrides, seed=1, **NEGATIVE), latents) < TOLERANCE
    without = expected("flux", PROMPTS[0], generator=seeded(1))
    assert relative_error(without, latents) > 0.01  # the canary: the prompt alone is something else
    assert relative_error(got("flux", PROMPTS[0], *overrides, seed=1), without) < TOLERANCE


@works_guidance
def test_true_guidance_of_a_batch():
    call = {"negative_prompt": ["blurry", "ugly old red"], "negative_prompt_2": ["low quality", "night"]}
    latents = expected("flux", TWO, true_cfg_scale=3.0, generator=seeded(1), **call)
    assert relative_error(got("flux", TWO, *GUIDED, true_cfg_scale=3.0, seed=1, **call), latents) < TOLERANCE
    first = got("flux", TWO, *GUIDED, true_cfg_scale=3.0, seed=1, negative_prompt=call["negative_prompt"])
    assert relative_error(first, latents) > 1e-3  # the canary: the second encoder's own text matters


@works_guidance
@pytest.mark.parametrize("call", [{"true_cfg_scale": 4.0}, {"negative_prompt": "blurry"}], ids=["scale", "negative"])
def test_true_guidance_needs_a_negative_prompt_and_a_scale(call):
    latents = expected("flux", PROMPTS[0], generator=seeded(1), **call)
    assert relative_error(got("flux", PROMPTS[0], *GUIDED, seed=1, **call), latents) < TOLERANCE


@works_guidance
def test_guidance_that_is_embedded_is_not_taken_for_true_guidance():
    def callback(pipe, *_):
        pipe._guidance_scale = 9.0
        return {}

    with pytest.raises(RequestError, match=r"^_guidance_scale: this model is told its guidance before"):
        got("flux", PROMPTS[0], *GUIDED, seed=1, callback_on_step_end=callback, **NEGATIVE)


@works_guidance
def test_negative_embeddings():
    pipe = ours("flux", *GUIDED)
    (negative,) = pipe.family_rules._text({"negative_prompt": "blurry"}, "negative_")
    embeds = {f"negative_{n}": negative[o] for n, o in pipe.family_rules.settings.text.embeds.items()}
    latents = expected("flux", PROMPTS[0], generator=seeded(1), true_cfg_scale=4.0, **embeds)
    assert relative_error(got("flux", PROMPTS[0], *GUIDED, seed=1, true_cfg_scale=4.0, **embeds), latents) < TOLERANCE


@works_guidance
@works_pictures
def test_both_at_once():
    call = {"image": PICTURE, "strength": 0.5, **NEGATIVE}
    latents = from_picture(PROMPTS[0], generator=seeded(1), **call)
    assert relative_error(got("flux", PROMPTS[0], *PICTURES, *GUIDED, seed=1, **call), latents) < TOLERANCE


def test_a_second_prompt_of_its_own():
    latents = expected("flux", PROMPTS[0], prompt_2="snow", generator=seeded(1))
    assert relative_error(got("flux", PROMPTS[0], prompt_2="snow", seed=1), latents) < TOLERANCE


# --- what is refused --------------------------------------------------------------------------------------------------

NO_CFG = (
    "{}: an artifact of FluxPipeline does not take it; it takes prompt, prompt_2, prompt_embeds, pooled_prompt_embeds"
)
REFUSED = {
    "true_cfg_scale": ((), {"true_cfg_scale": 2.0}, NO_CFG.format("true_cfg_scale")),
    "negative_prompt": ((), {"negative_prompt": "x"}, NO_CFG.format("negative_prompt")),
    "ip_adapter_image": ((), {"ip_adapter_image": PICTURE}, NO_CFG.format("ip_adapter_image")),
    "mask": (
        PICTURES,
        {"image": PICTURE, "mask_image": PICTURE},
        "mask_image: artifacts of this family do not take it",
    ),
    "no step": (
        PICTURES,
        {"image": PICTURE, "strength": 0.0},
        "strength=0.0: of 8 steps none is left to take; give at least 0.125",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_calls(case):
    overrides, call, sentence = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        got("flux", "snow", *overrides, **call)
    assert str(caught.value).startswith(sentence)


def test_the_least_strength_that_the_refusal_names_is_taken():
    latents = from_picture(PROMPTS[0], strength=0.125, generator=seeded(1))
    drawn = got("flux", PROMPTS[0], *PICTURES, image=PICTURE, strength=0.125, seed=1)
    assert relative_error(drawn, latents) < TOLERANCE


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (
            Size(30, 32, 16),
            "expected multiples of 4 (VAE factor 2, patches of 2), got 30 x 32; the nearest are 32 x 32",
        ),
        (Size(32, 32, 513), "shapes.max_sequence_length: expected 1 to 512 tokens as FLUX's pipelines do, got 513"),
    ],
)
def test_sizes_that_the_pipeline_would_not_draw_are_refused(size, sentence):
    with pytest.raises(ExportError) as caught:
        flux.check_size(eager("flux"), size)
    assert str(caught.value).endswith(sentence)


def test_schnells_four_steps_are_too_few_for_the_recipes_cache():
    planned = prepared(resolve("flux-fast", (*FLOAT32, "quantize.method=none"), "tiny:flux-schnell"))
    assert [(plan.name, plan.cache) for plan in planned.planned.plans] == [("4", "none")]
    assert planned.recipe.cache.method == "none"


def test_a_family_without_pictures_refuses_to_begin_from_one():
    class Alone:
        """A family's module that takes no picture."""

        PICTURE = None

    with pytest.raises(RecipeError, match=r"sampler\.image_to_image: .* start from noise alone"):
        has_picture_input(resolve("flux-fast", PICTURES), Alone)
    assert has_picture_input(resolve("flux-fast", PICTURES), flux)
    assert not has_picture_input(resolve("flux-fast"), flux)
