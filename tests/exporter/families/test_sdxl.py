"""Stable Diffusion XL: texts, sizes, rescaled guidance, schedulers and the VAE; against diffusers' pipelines."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionXLImg2ImgPipeline

from prebake.exporter.families import sdxl
from prebake.exporter.families.registry import find_family
from prebake.exporter.verify.replayer import Replayer
from support.family_parity import (
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
from support.sdxl_calls import SIZE, TWO, plain, planned, scheduled, works

# --- text ---------------------------------------------------------------------------------------------------------------


def test_each_encoder_may_have_a_text_of_its_own():
    call = {"prompt_2": PROMPTS[1], "negative_prompt": "blurry", "negative_prompt_2": "old"}
    latents = expected("sdxl", PROMPTS[0], generator=seeded(1), **call)
    assert relative_error(got("sdxl", PROMPTS[0], seed=1, **call), latents) < TOLERANCE
    for name in ("prompt_2", "negative_prompt_2"):  # the canary: each of them matters
        fewer = {n: text for n, text in call.items() if n != name}
        assert relative_error(got("sdxl", PROMPTS[0], seed=1, **fewer), latents) > 1e-4


def test_no_negative_prompt_is_zeros_and_an_empty_one_is_a_text():
    zeros, empty = (expected("sdxl", PROMPTS[0], generator=seeded(1), negative_prompt=n) for n in (None, ""))
    assert relative_error(zeros, empty) > 1e-3
    assert relative_error(got("sdxl", PROMPTS[0], seed=1), zeros) < TOLERANCE
    assert relative_error(got("sdxl", PROMPTS[0], seed=1, negative_prompt=""), empty) < TOLERANCE


@works("guidance rescale", "sdxl", "sdxl-refiner")
@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
def test_rescaled_guidance(name):
    latents = expected(name, TWO, generator=seeded(1), guidance_rescale=0.7)
    assert relative_error(got(name, TWO, seed=1, guidance_rescale=0.7), latents) < TOLERANCE
    assert relative_error(got(name, TWO, seed=1), latents) > 1e-3  # the canary: as it comes


# --- sizes --------------------------------------------------------------------------------------------------------------

SIZES = {
    "original": {"original_size": (640, 480)},
    "crop": {"crops_coords_top_left": (5, 300)},
    "target": {"target_size": (1024, 768)},
    "negative": {"negative_original_size": (64, 64), "negative_target_size": (512, 300)},
    "all": {
        "original_size": (640, 480),
        "crops_coords_top_left": (5, 300),
        "target_size": (1024, 768),
        "negative_original_size": (64, 64),
        "negative_crops_coords_top_left": (100, 20),
        "negative_target_size": (512, 300),
    },
    "crop of one branch": {
        "crops_coords_top_left": (5, 300),
        "negative_original_size": (64, 64),
        "negative_target_size": (512, 300),
    },
}


@works("sizes and crops")
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_told_to_the_model(name):
    latents = expected("sdxl", PROMPTS[0], generator=seeded(1), **SIZES[name])
    assert relative_error(got("sdxl", PROMPTS[0], seed=1, **SIZES[name]), latents) < TOLERANCE
    assert relative_error(got("sdxl", PROMPTS[0], seed=1), latents) > 1e-3  # the canary: the picture's own


def test_without_guidance_negative_sizes_say_nothing():
    latents = expected("sdxl", PROMPTS[0], generator=seeded(1), guidance_scale=1.0, **SIZES["all"])
    drawn = got("sdxl", PROMPTS[0], seed=1, guidance_scale=1.0, **SIZES["all"])
    assert relative_error(drawn, latents) < TOLERANCE


def test_negative_sizes_are_each_images_own():
    """Not so in diffusers, which gives the negative size to every second row of the batch, whatever its branch."""
    drawn = got("sdxl", TWO, generator=[seeded(1), seeded(2)], **SIZES["all"])
    for i, prompt in enumerate(TWO):
        latents = expected("sdxl", prompt, generator=seeded(i + 1), **SIZES["all"])
        assert relative_error(drawn[i : i + 1], latents) < TOLERANCE


SCORES = {
    "score": {"aesthetic_score": 3.0},
    "negative score": {"negative_aesthetic_score": 5.5},
    "sizes": {
        "original_size": (640, 480),
        "crops_coords_top_left": (5, 300),
        "negative_crops_coords_top_left": (100, 20),
    },
    "negative size": {"negative_original_size": (64, 64)},
}


@works("sizes and crops", "sdxl-refiner")
@pytest.mark.parametrize("name", SCORES)
def test_the_refiner_is_told_a_score(name):
    call = {"strength": 0.8, **SCORES[name]}
    latents = expected("sdxl-refiner", PROMPTS[0], generator=seeded(1), **call)
    assert relative_error(got("sdxl-refiner", PROMPTS[0], seed=1, **call), latents) < TOLERANCE
    drawn = got("sdxl-refiner", PROMPTS[0], seed=1, strength=0.8)
    assert relative_error(drawn, latents) > 1e-3  # the canary: the usual ones


@torch.no_grad()
def test_in_bfloat16_sizes_and_timesteps_are_not_rounded():
    """1025 pixels would be 1024 in bfloat16, which is what diffusers' pipelines say then."""
    unet = copy.deepcopy(eager("sdxl").unet).to(torch.bfloat16)
    module = sdxl.denoiser(SimpleNamespace(**{**eager("sdxl").components, **plain("sdxl"), "unet": unet}), SIZE).module
    latents, timestep, states, pooled, ids, *scalars = sdxl.denoiser(eager("sdxl"), SIZE).args
    one = module(latents, timestep, states, pooled, ids, *scalars)
    assert not torch.equal(module(latents, timestep + 1, states, pooled, ids, *scalars), one)
    sized = [module(latents, timestep, states, pooled, torch.full_like(ids, n), *scalars) for n in (1024.0, 1025.0)]
    assert not torch.equal(*sized)


@works("other schedulers")
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_another_scheduler_is_another_plan(name):
    with scheduled(name):
        latents = expected("sdxl", PROMPTS[0], generator=seeded(1))
    drawn = planned("sdxl", name)(PROMPTS[0], seed=1, output_type="latent")[0]
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(got("sdxl", PROMPTS[0], seed=1), latents) > 1e-4  # the canary: the model's own


# --- caches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@works("caches")
def test_the_recipes_cache_is_that_of_its_package():
    deepcache = ("cache.method=deepcache", "cache.cache_interval=3", "cache.cache_branch_id=0")
    peer = DeepCacheSDHelper(pipe=eager("sdxl"))
    peer.set_params(cache_interval=3, cache_branch_id=0)
    peer.enable()
    try:
        latents = expected("sdxl", TWO[0], generator=seeded(1), negative_prompt="blurry")
    finally:
        peer.disable()
    draw = partial(got, "sdxl", TWO[0], *deepcache, seed=1, negative_prompt="blurry")
    assert relative_error(draw(), latents) < TOLERANCE
    assert relative_error(draw(cache=False), latents) > 1e-3  # the canary: everything computed


# --- the VAE --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def whitened():
    """The eager base with a VAE whose configuration has mean and deviation of its latents, as Playground 2.5 has."""
    vae = eager("sdxl").vae
    given = {"latents_mean": [-1.6, 1.1, 1.3, -4.0], "latents_std": [8.4, 5.9, 5.3, 6.6], "scaling_factor": 0.5}
    usual = {name: vae.config.get(name) for name in given}
    vae.register_to_config(**given)
    yield eager("sdxl")
    vae.register_to_config(**usual)


@torch.no_grad()
def test_a_vae_that_knows_mean_and_deviation_of_its_latents(whitened):
    decoder, encoder = sdxl.vae_halves(whitened.vae, False)
    prepared = as_kind(StableDiffusionXLImg2ImgPipeline, whitened)
    pixels = prepared.image_processor.preprocess(PICTURE)
    latents = prepared.prepare_latents(
        pixels, None, 1, 1, torch.float32, torch.device("cpu"), generator=seeded(1), add_noise=False
    )
    mean, std = encoder(pixels)
    drawn = mean + std * torch.randn(mean.shape, generator=seeded(1))
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(mean, latents) > 1e-3  # the canary: the deviation matters
    steps = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt"}
    seen = {}

    def keep(pipe, step, timestep, tensors):
        seen.update(tensors)
        return {}

    image = whitened("snow", generator=seeded(1), callback_on_step_end=keep, **steps).images
    # both clamped to 0..1 after float32 convolutions of the same numbers, scaled in another order
    torch.testing.assert_close(decoder(seen["latents"])[0], image, rtol=0, atol=1e-5)


def test_the_watermark_is_left_out():
    pipe = eager("sdxl")
    pipe.watermark = SimpleNamespace(apply_watermark=lambda image: torch.zeros_like(image))
    try:
        _, image = sdxl.draw(pipe, "snow", 1, 1, 5.0, SIZE)
        assert image.any()
        assert pipe.watermark is not None
    finally:
        pipe.watermark = None


@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
def test_verification_draws_the_same_with_both(name):
    """With every step of the plan, the refiner too."""
    replayer = Replayer(ours(name).artifact)
    drawn = replayer.draw(PROMPTS[0], 3, ours(name).artifact.plans["8"])
    assert len(replayer.evaluations(drawn)) == 8
    latents, _ = sdxl.draw(eager(name), PROMPTS[0], 3, 8, 5.0, SIZE)
    assert relative_error(drawn.latents, latents) < TOLERANCE
    other, _ = sdxl.draw(eager(name), PROMPTS[0], 4, 8, 5.0, SIZE)
    assert relative_error(other, latents) > 0.1  # the canary: another seed


def test_both_pipelines_are_of_this_family():
    assert {find_family(eager(name)) for name in ("sdxl", "sdxl-refiner")} == {sdxl}
