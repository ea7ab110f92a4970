"""Stable Diffusion: pictures to begin from, masks, rescaled guidance and other schedulers; against diffusers' pipelines."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from prebake.exporter.families import sd
from prebake.exporter.families.picture import Size, example_picture
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime.errors import ExportError, RequestError
from support.captured_pipeline import uncompiled
from support.family_parity import PICTURE, PLAIN, PROMPTS, TOLERANCE, eager, expected, got, relative_error, seeded

PICTURES = ("sampler.image_to_image=true",)
TWO = list(PROMPTS[:2])
OTHER = example_picture(Size(32, 32, 0), 4)
SHORT = {"num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent"}

works_pictures = pytest.mark.works("sd", "image to image")
works_masks = pytest.mark.works("sd", "inpainting")


def square(left: int, top: int, right: int, bottom: int) -> Image.Image:
    """White in a rectangle, black around it."""
    mask = np.zeros((32, 32), np.uint8)
    mask[top:bottom, left:right] = 255
    return Image.fromarray(mask)


MASK = square(4, 8, 20, 24)


@functools.cache
def peer(kind: type, tiny: str = "sd", scheduler: str | None = None) -> Any:
    """Another diffusers pipeline of the same components, with the named scheduler."""
    parts = dict(eager(tiny).components)
    if scheduler:
        parts["scheduler"] = getattr(diffusers, scheduler).from_config(parts["scheduler"].config)
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_picture(prompt, *, tiny: str = "sd", scheduler: str | None = None, image=PICTURE, **call) -> torch.Tensor:
    """diffusers' latents of image-to-image, of 8 steps."""
    return peer(StableDiffusionImg2ImgPipeline, tiny, scheduler)(prompt, image=image, **{**SHORT, **call})[0]


def inpainted(
    prompt, *, tiny: str = "sd", scheduler: str | None = None, image=PICTURE, mask_image=MASK, **call
) -> torch.Tensor:
    """diffusers' latents of inpainting, of 8 steps."""
    given = {"image": image, "mask_image": mask_image, "height": 32, "width": 32, **SHORT, **call}
    return peer(StableDiffusionInpaintPipeline, tiny, scheduler)(prompt, **given)[0]


# --- image to image ---------------------------------------------------------------------------------------------------


@works_pictures
@pytest.mark.parametrize("tiny", ["sd", "sd2"])
@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_a_picture_to_begin_from(tiny, strength):
    latents = from_picture(PROMPTS[0], tiny=tiny, strength=strength, generator=seeded(1))
    call = {"strength": strength, "seed": 1}
    assert relative_error(got(tiny, PROMPTS[0], *PICTURES, image=PICTURE, **call), latents) < TOLERANCE
    if strength < 1:
        assert relative_error(got(tiny, PROMPTS[0], *PICTURES, image=OTHER, **call), latents) > 0.01  # the canary


@works_pictures
def test_the_usual_strength_is_that_of_diffusers():
    latents = from_picture(PROMPTS[0], generator=seeded(1))
    assert relative_error(got("sd", PROMPTS[0], *PICTURES, image=PICTURE, seed=1), latents) < TOLERANCE


@works_pictures
@pytest.mark.parametrize("image", [PICTURE, [PICTURE, OTHER]], ids=["one picture", "a picture each"])
@pytest.mark.parametrize("each", [False, True], ids=["one generator", "a generator each"])
def test_batches_of_pictures(image, each):
    call = {"image": image, "strength": 0.5, "negative_prompt": ["blurry", "old"]}
    latents = from_picture(TWO, generator=[seeded(1), seeded(2)] if each else seeded(1), **call)
    generator = [seeded(1), seeded(2)] if each else seeded(1)
    assert relative_error(got("sd", TWO, *PICTURES, generator=generator, **call), latents) < TOLERANCE


# --- inpainting -------------------------------------------------------------------------------------------------------


@works_masks
@pytest.mark.parametrize("tiny", ["sd", "sd2"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_masked_part_is_drawn(tiny, strength):
    latents = inpainted(PROMPTS[0], tiny=tiny, strength=strength, generator=seeded(1))
    call = {"image": PICTURE, "strength": strength, "seed": 1}
    assert relative_error(got(tiny, PROMPTS[0], *PICTURES, mask_image=MASK, **call), latents) < TOLERANCE
    other = got(tiny, PROMPTS[0], *PICTURES, mask_image=square(8, 8, 24, 24), **call)
    assert relative_error(other, latents) > 0.01  # the canary


@works_masks
def test_the_usual_strength_of_inpainting_is_that_of_diffusers():
    latents = inpainted(PROMPTS[0], generator=seeded(1))
    drawn = got("sd", PROMPTS[0], *PICTURES, image=PICTURE, mask_image=MASK, seed=1)
    assert relative_error(drawn, latents) < TOLERANCE


BATCHES = {
    "one of each": (PICTURE, MASK),
    "two pictures": ([PICTURE, OTHER], MASK),
    "two masks": (PICTURE, [MASK, square(0, 0, 16, 16)]),
}


@works_masks
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("each", [False, True], ids=["one generator", "a generator each"])
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_draws_are_in_the_order_of_diffusers(batch, each, scheduler):
    """Picture, noise, a masked copy that goes unused, and then what a stochastic scheduler draws."""
    image, mask = BATCHES[batch]
    call = {"image": image, "mask_image": mask, "strength": 0.5, "num_images_per_prompt": 2}
    generators = [seeded(i) for i in range(4)] if each else seeded(1)
    latents = inpainted(TWO, scheduler=scheduler, generator=generators, **call)
    generators = [seeded(i) for i in range(4)] if each else seeded(1)
    drawn = got("sd", TWO, *PICTURES, f"sampler.scheduler={scheduler}", generator=generators, **call)
    assert relative_error(drawn, latents) < TOLERANCE


# --- a VAE that gives latents, and no distribution ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tiny_vae(tmp_path_factory):
    """The model with `AutoencoderTiny`, as people put it there for speed: diffusers' pipeline, and the artifact."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.7,
    )
    pipe = StableDiffusionPipeline(**{**eager("sd").components, "vae": vae.eval()}, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("tiny-vae")
    pipe.save_pretrained(folder / "model")
    recipe = resolve(
        "sd-fast",
        (*PLAIN, *PICTURES, "shapes.height=32", "shapes.width=32", "fuse.vae_qkv=false", "sampler.steps=4"),
        str(folder / "model"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, uncompiled(recipe, folder)


@works_pictures
@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
@pytest.mark.parametrize("each", [False, True], ids=["one generator", "a generator each"])
def test_pictures_of_a_tiny_vae(with_tiny_vae, kind, each):
    """Nothing is drawn for the picture's latents, nor for a mask's, so that what is drawn afterwards is the same."""
    pipe, artifact = with_tiny_vae
    theirs = kind(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    masked = {"mask_image": MASK} if kind is StableDiffusionInpaintPipeline else {}
    size = {"height": 32, "width": 32} if masked else {}
    call = {
        "image": [PICTURE, OTHER],
        "strength": 0.5,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "output_type": "latent",
        **masked,
    }
    generators = [[seeded(1), seeded(2)] if each else seeded(1) for _ in range(2)]
    latents = theirs(TWO, generator=generators[0], **call, **size)[0]
    drawn = artifact(TWO, generator=generators[1], **call)[0]
    assert relative_error(drawn, latents) < TOLERANCE
    other = artifact(TWO, seed=2, **call)[0]
    assert relative_error(other, latents) > 0.01  # the canary


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.works("sd", "guidance rescale")
@pytest.mark.parametrize("branches", ["sequential", "batched"])
def test_rescaled_guidance(branches):
    call = {"negative_prompt": "blurry", "guidance_rescale": 0.7}
    latents = expected("sd", PROMPTS[0], generator=seeded(1), **call)
    override = f"guidance.branches={branches}"
    assert relative_error(got("sd", PROMPTS[0], override, seed=1, **call), latents) < TOLERANCE
    plain = got("sd", PROMPTS[0], override, seed=1, negative_prompt="blurry")
    assert relative_error(plain, latents) > 1e-3  # the canary


# --- other schedulers -------------------------------------------------------------------------------------------------

SCHEDULERS = (
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
)


@pytest.mark.works("sd", "other schedulers")
@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(s, marks=pytest.mark.slow) if s in ("DDIMScheduler", "UniPCMultistepScheduler") else s
        for s in SCHEDULERS
    ],
)
def test_another_scheduler(scheduler):
    override = f"sampler.scheduler={scheduler}"
    pipe = peer(StableDiffusionPipeline, "sd", scheduler)
    latents = pipe(PROMPTS[0], generator=seeded(1), height=32, width=32, **SHORT)[0]
    assert relative_error(got("sd", PROMPTS[0], *PICTURES, override, seed=1), latents) < TOLERANCE
    assert relative_error(got("sd", PROMPTS[0], seed=1), latents) > 1e-3  # the canary: the model's own


@works_pictures
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_a_picture_with_another_scheduler(scheduler, strength):
    latents = from_picture(TWO, scheduler=scheduler, strength=strength, generator=seeded(1))
    call = {"image": PICTURE, "strength": strength, "seed": 1}
    assert relative_error(got("sd", TWO, *PICTURES, f"sampler.scheduler={scheduler}", **call), latents) < TOLERANCE


@works_masks
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_mask_with_another_scheduler(scheduler, strength):
    """UniPC too, whose corrector goes on from latents of before the blend: they differ only where the blend puts the picture."""
    latents = inpainted(PROMPTS[0], scheduler=scheduler, strength=strength, generator=seeded(1))
    call = {"image": PICTURE, "mask_image": MASK, "strength": strength, "seed": 1}
    drawn = got("sd", PROMPTS[0], *PICTURES, f"sampler.scheduler={scheduler}", **call)
    assert relative_error(drawn, latents) < TOLERANCE


# --- what is refused --------------------------------------------------------------------------------------------------

START = {"image": PICTURE}
REFUSED = {
    "image, not exported for it": (
        (),
        START,
        "image: the artifact was exported without image-to-image; export again with sampler.image_to_image=true",
    ),
    "mask alone": (PICTURES, {"mask_image": MASK}, "mask_image: expected an image with it, got none"),
    "strength alone": (PICTURES, {"strength": 0.5}, "strength: expected an image with it, got none"),
    "strength above 1": (
        PICTURES,
        {**START, "strength": 1.2},
        "strength=1.2: expected a number from 0 (the image stays) to 1 (it does not matter)",
    ),
    "no step": (
        PICTURES,
        {**START, "strength": 0.1},
        "strength=0.1: of 8 steps none is left to take; give at least 0.125",
    ),
    "three pictures for four": (
        PICTURES,
        {"image": [PICTURE] * 3, "num_images_per_prompt": 4},
        "image: expected one picture, or a number that divides 4; got 3",
    ),
    "three masks for four": (
        PICTURES,
        {**START, "mask_image": [MASK] * 3, "num_images_per_prompt": 4},
        "mask_image: expected one mask, or a number that divides 4; got 3",
    ),
    "latents and image": (
        PICTURES,
        {**START, "latents": torch.zeros(1, 4, 16, 16)},
        "expected either image or latents, got both: the latents that a picture starts from follow from it",
    ),
    "latents of another size": (
        PICTURES,
        {"image": torch.zeros(1, 4, 8, 8)},
        "image: expected a picture, or latents [1, 4, 16, 16], got [1, 4, 8, 8]",
    ),
}


def test_a_unet_that_sees_a_picture_is_refused():
    from diffusers import UNet2DConditionModel

    class Inpainting:
        """Stable Diffusion's own model for inpainting, but for its weights."""

        unet = UNet2DConditionModel(**{**eager("sd").unet.config, "in_channels": 9})
        vae, tokenizer, vae_scale_factor = eager("sd").vae, eager("sd").tokenizer, 2

    with pytest.raises(ExportError, match=r"in_channels: expected 4 .*, got 9: UNets that see"):
        sd.check_size(Inpainting, Size(32, 32, 16))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_calls(case):
    overrides, call, sentence = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        got("sd", "snow", *overrides, **call)
    assert str(caught.value) == sentence


def test_the_least_strength_that_the_refusal_names_is_taken():
    latents = from_picture(PROMPTS[0], strength=0.125, generator=seeded(1))
    drawn = got("sd", PROMPTS[0], *PICTURES, image=PICTURE, strength=0.125, seed=1)
    assert relative_error(drawn, latents) < TOLERANCE


# --- guidance that a callback changes ---------------------------------------------------------------------------------


def guidance_below(timestep: int, **changed: float):
    """A callback that sets the guidance of the steps after that timestep, for either pipeline. Diffusers calls it after each
    evaluation, of which PNDM's first step has two."""

    def callback(pipe, _, now, tensors):
        if now >= timestep or pipe.guidance_scale == changed["guidance_scale"]:
            return tensors
        for name, value in changed.items():
            setattr(pipe, f"_{name}", value)
        if changed["guidance_scale"] <= 1 and "prompt_embeds" in tensors:  # diffusers then wants one branch's
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return callback


CHANGES = {
    "more": {"guidance_scale": 9.0},
    "less": {"guidance_scale": 1.5},
    "none": {"guidance_scale": 0.0},
    "rescaled": {"guidance_scale": 9.0, "guidance_rescale": 0.7},
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_callback_changes_the_guidance_of_the_steps_that_follow(case):
    changed = guidance_below(700, **CHANGES[case])
    call = {"guidance_scale": 5.0, "negative_prompt": ["blue", "square"]}
    theirs = {"callback_on_step_end": changed, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    latents = expected("sd", TWO, generator=seeded(1), **call, **theirs)
    drawn = got("sd", TWO, seed=1, callback_on_step_end=changed, **call)
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(got("sd", TWO, seed=1, **call), latents) > 1e-3  # the canary: it has an effect
    assert torch.equal(got("sd", TWO, seed=1, callback_on_step_end=changed, **call), drawn)  # and none on the next call


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        (1.0, 5.0, r"^_guidance_scale=5: the call began without guidance"),
        (5.0, "5", r"^_guidance_scale: expected a number, got '5'"),
        (5.0, float("nan"), r"^_guidance_scale=nan: expected a finite number"),
    ],
)
def test_guidance_that_a_step_cannot_have_is_refused(first, then, told):
    def callback(pipe, *_):
        pipe._guidance_scale = then
        return {}

    with pytest.raises(RequestError, match=told):
        got("sd", "snow", seed=1, guidance_scale=first, callback_on_step_end=callback)
