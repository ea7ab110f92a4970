"""Stable Diffusion XL from a picture: image to image, inpainting, and a schedule that base and refiner share; against diffusers'
pipelines."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.family_parity import (
    PICTURE,
    PROMPTS,
    TOLERANCE,
    expected,
    got,
    relative_error,
    seeded,
)
from support.sdxl_calls import MASK, OTHER, TWO, from_picture, painted, planned, scheduled, works

# --- image to image -------------------------------------------------------------------------------------------------------


@works("image to image")
@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
def test_a_picture_to_begin_from(strength):
    latents = from_picture(PROMPTS[0], image=PICTURE, strength=strength, generator=seeded(1))
    draw = partial(got, "sdxl", PROMPTS[0], strength=strength)
    assert relative_error(draw(image=PICTURE, seed=1), latents) < TOLERANCE
    assert relative_error(draw(image=PICTURE, seed=2), latents) > 0.1  # the canaries: other noise
    assert relative_error(draw(image=OTHER, seed=1), latents) > 0.01  # another picture


@works("image to image", "sdxl", "sdxl-refiner")
@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
def test_the_usual_strength_is_that_of_diffusers(name):
    latents = from_picture(PROMPTS[0], model=name, image=PICTURE, generator=seeded(1))
    assert relative_error(got(name, PROMPTS[0], image=PICTURE, seed=1), latents) < TOLERANCE


@works("image to image", "sdxl", "sdxl-refiner")
@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("each", [False, True], ids=["one generator", "a generator each"])
def test_batches_of_pictures(name, each):
    for image in (PICTURE, [PICTURE, OTHER]):
        generators = [[seeded(1), seeded(2)] if each else seeded(1) for _ in range(2)]
        call = {"image": image, "strength": 0.5}
        latents = from_picture(TWO, model=name, generator=generators[0], **call)
        assert relative_error(got(name, TWO, generator=generators[1], **call), latents) < TOLERANCE


@works("image to image")
def test_latents_may_stand_for_the_picture():
    call = {"image": torch.randn(1, 4, 16, 16, generator=seeded(3)), "strength": 0.5}
    latents = from_picture(PROMPTS[0], generator=seeded(1), **call)
    assert relative_error(got("sdxl", PROMPTS[0], seed=1, **call), latents) < TOLERANCE


@works("image to image")
def test_noise_at_every_step_is_drawn_after_that_of_the_picture():
    with scheduled("EulerAncestralDiscreteScheduler"):
        latents = from_picture(TWO, image=PICTURE, strength=0.5, generator=seeded(1))
    pipe = planned("sdxl", "EulerAncestralDiscreteScheduler")
    drawn = pipe(TWO, image=PICTURE, strength=0.5, seed=1, output_type="latent")[0]
    assert relative_error(drawn, latents) < TOLERANCE


# --- inpainting -----------------------------------------------------------------------------------------------------------


@works("inpainting")
@pytest.mark.parametrize("strength", [None, 0.5, 1.0])
def test_a_masked_part_is_painted(strength):
    call = {"image": PICTURE, "mask_image": MASK, **({} if strength is None else {"strength": strength})}
    latents = painted(PROMPTS[0], generator=seeded(1), **call)
    assert relative_error(got("sdxl", PROMPTS[0], seed=1, **call), latents) < TOLERANCE
    other = got("sdxl", PROMPTS[0], seed=1, **{**call, "mask_image": MASK.transpose(Image.Transpose.ROTATE_90)})
    assert relative_error(other, latents) > 0.01  # the canary: another mask


@works("inpainting")
@pytest.mark.parametrize("each", [False, True], ids=["one generator", "a generator each"])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_masked_part_of_several_pictures(each, scheduler):
    """With noise at every step too, of which the numbers follow all that is drawn before."""
    pipe = planned("sdxl", scheduler)
    for image in (PICTURE, [PICTURE, OTHER], torch.randn(1, 4, 16, 16, generator=seeded(3))):
        generators = [[seeded(1), seeded(2)] if each else seeded(1) for _ in range(2)]
        call = {"image": image, "mask_image": MASK, "strength": 0.5}
        with scheduled(scheduler):
            latents = painted(TWO, generator=generators[0], **call)
        drawn = pipe(TWO, generator=generators[1], output_type="latent", **call)[0]
        assert relative_error(drawn, latents) < TOLERANCE


# --- a schedule that base and refiner share -------------------------------------------------------------------------------


@works("shared schedule", "sdxl", "sdxl-refiner")
@pytest.mark.parametrize("part", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_the_refiner_ends_what_the_base_began(part, scheduler):
    base, refiner = (partial(planned(name, scheduler), output_type="latent") for name in ("sdxl", "sdxl-refiner"))
    with scheduled(scheduler, "sdxl", "sdxl-refiner"):
        begun = expected("sdxl", TWO, generator=seeded(1), denoising_end=part)
        ended = from_picture(TWO, model="sdxl-refiner", image=begun, denoising_start=part, generator=seeded(2))
    handed = base(TWO, seed=1, denoising_end=part)[0]
    assert relative_error(handed, begun) < TOLERANCE
    drawn = refiner(TWO, image=handed, denoising_start=part, seed=2)[0]
    assert relative_error(drawn, ended) < TOLERANCE
    later = refiner(TWO, image=handed, denoising_start=part + 0.15, seed=2)[0]
    assert relative_error(later, ended) > 1e-3  # the canary: a step less


@works("shared schedule")
def test_a_part_from_the_middle():
    call: dict[str, Any] = {"denoising_start": 0.25, "denoising_end": 0.6}
    image = torch.randn(1, 4, 16, 16, generator=seeded(3))
    latents = from_picture(PROMPTS[0], image=image, generator=seeded(1), **call)
    assert relative_error(got("sdxl", PROMPTS[0], image=image, seed=1, **call), latents) < TOLERANCE
    of_numpy = {
        name: np.float32(part) for name, part in call.items()
    }  # which diffusers takes for no part of the schedule
    assert torch.equal(
        got("sdxl", PROMPTS[0], image=image, seed=1, **of_numpy), got("sdxl", PROMPTS[0], image=image, seed=1, **call)
    )
    strong = from_picture(PROMPTS[0], image=PICTURE, strength=0.7, denoising_end=0.6, generator=seeded(1))
    drawn = got("sdxl", PROMPTS[0], image=PICTURE, strength=0.7, denoising_end=0.6, seed=1)
    assert relative_error(drawn, strong) < TOLERANCE


@works("shared schedule")
def test_a_picture_and_a_mask_from_the_middle():
    for mask in ({}, {"mask_image": MASK}):
        call: dict[str, Any] = {"image": PICTURE, "denoising_start": 0.4, **mask}
        latents = (painted if mask else from_picture)(PROMPTS[0], generator=seeded(1), **call)
        assert relative_error(got("sdxl", PROMPTS[0], seed=1, **call), latents) < TOLERANCE


def test_a_callback_counts_the_steps_of_the_part():
    seen, theirs = [], []

    def ours_(pipe, step, timestep, tensors):
        seen.append((step, float(timestep)))

    def eager_(pipe, step, timestep, tensors):
        theirs.append((step, float(timestep)))
        return {}

    call = {"denoising_start": 0.25, "denoising_end": 0.6, "image": torch.zeros(1, 4, 16, 16)}
    _ = got("sdxl", "snow", seed=1, callback_on_step_end=ours_, **call)
    _ = from_picture("snow", generator=seeded(1), callback_on_step_end=eager_, **call)
    assert 0 < len(seen) < 8
    assert seen == theirs
