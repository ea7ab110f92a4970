"""Stable Diffusion XL: sizes, pictures, masks, rescaled guidance, and a schedule that base and refiner share; against diffusers'
pipelines."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image, ImageDraw

from prebake.exporter.caches import Decision, Schedule
from prebake.exporter.families import sdxl
from prebake.exporter.families.picture import Size, example_picture
from prebake.exporter.families.registry import find_family
from prebake.exporter.plan import join_plan
from prebake.exporter.plan.sampler import tabulate_scheduler, tabulate_tails
from prebake.exporter.verify.replayer import Replayer
from prebake.runtime.errors import ExportError, RequestError
from prebake.runtime.pipeline import Pipeline
from prebake.runtime.replay import tabulate_plan
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

SIZE = Size(32, 32, 16)
TWO = list(PROMPTS[:2])
OTHER = example_picture(Size(32, 32, 0), 4)
MASK = Image.new("L", (32, 32))
ImageDraw.Draw(MASK).rectangle((8, 4, 23, 19), fill=255)


def works(ability: str, *names: str):
    """For the docs' table: the test shows this ability, of the base where no names are given."""

    def marked(test):
        for name in names or ("sdxl",):
            test = pytest.mark.works(name, ability)(test)
        return test

    return marked


def as_called(kind: type, prompt, *, model: str = "sdxl", **call) -> torch.Tensor:
    """diffusers' latents of another pipeline class around the same model, eight steps."""
    usual = {"num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent"}
    return as_kind(kind, eager(model))(prompt=prompt, **{**usual, **call})[0]


from_picture = partial(as_called, StableDiffusionXLImg2ImgPipeline)
painted = partial(as_called, StableDiffusionXLInpaintPipeline, height=32, width=32)


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


def plain(model: str) -> dict:
    """What a pipeline has besides its components, as far as an export asks."""
    return {"config": eager(model).config, "vae_scale_factor": eager(model).vae_scale_factor}


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


@contextmanager
def scheduled(name: str, *models: str):
    """The eager pipelines with that scheduler."""
    pipes = [eager(model) for model in models or ("sdxl",)]
    usual = [pipe.scheduler for pipe in pipes]
    for pipe in pipes:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    try:
        yield
    finally:
        for pipe, scheduler in zip(pipes, usual, strict=True):
            pipe.scheduler = scheduler


@functools.cache
def tables(name: str):
    """The scheduler's table for eight steps, and those of its later starts."""
    scheduler = getattr(diffusers, name).from_config(eager("sdxl").scheduler.config)
    return tabulate_scheduler(scheduler, 8), tabulate_tails(scheduler, 8)


def planned(model: str, name: str) -> Pipeline:
    """The same artifact with that scheduler's plan: graphs know no scheduler."""
    pipe = ours(model)
    whole, tails = tables(name)
    schedule = Schedule((), tuple(Decision() for _ in whole.updates))
    plan = join_plan("8", 8, "none", whole, schedule, {(): "full"}, tails)
    artifact = replace(
        pipe.artifact, plans={"8": plan}, tables={"8": tabulate_plan(plan, pipe.artifact.device)}, _tails={}
    )
    return Pipeline(artifact)


@works("image to image")
def test_noise_at_every_step_is_drawn_after_that_of_the_picture():
    with scheduled("EulerAncestralDiscreteScheduler"):
        latents = from_picture(TWO, image=PICTURE, strength=0.5, generator=seeded(1))
    pipe = planned("sdxl", "EulerAncestralDiscreteScheduler")
    drawn = pipe(TWO, image=PICTURE, strength=0.5, seed=1, output_type="latent")[0]
    assert relative_error(drawn, latents) < TOLERANCE


@works("other schedulers")
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_another_scheduler_is_another_plan(name):
    with scheduled(name):
        latents = expected("sdxl", PROMPTS[0], generator=seeded(1))
    drawn = planned("sdxl", name)(PROMPTS[0], seed=1, output_type="latent")[0]
    assert relative_error(drawn, latents) < TOLERANCE
    assert relative_error(got("sdxl", PROMPTS[0], seed=1), latents) > 1e-4  # the canary: the model's own


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


# --- what is refused ------------------------------------------------------------------------------------------------------

BASE = (
    "{}: an artifact of StableDiffusionXLPipeline does not take it; it takes prompt, prompt_2, prompt_embeds, "
    "pooled_prompt_embeds, negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds, "
    "guidance_rescale, original_size, crops_coords_top_left, target_size, negative_original_size, "
    "negative_crops_coords_top_left, negative_target_size, denoising_start, denoising_end"
)
REFUSED = {
    "score": ("sdxl", {"aesthetic_score": 6.0}, BASE.format("aesthetic_score")),
    "ip_adapter_image": ("sdxl", {"ip_adapter_image": PICTURE}, BASE.format("ip_adapter_image")),
    "no picture": (
        "sdxl-refiner",
        {"image": None},
        "image: expected a picture to begin with, got none; this model draws nothing without",
    ),
    "lone size": (
        "sdxl",
        {"negative_original_size": (8, 8)},
        "negative_target_size: expected with the other negative sizes, got none; they have an effect together only",
    ),
    "size": (
        "sdxl",
        {"original_size": 1024},
        "original_size: expected two numbers of pixels, down and across, got 1024",
    ),
    "number": ("sdxl-refiner", {"aesthetic_score": "good"}, "aesthetic_score: expected a number, got 'good'"),
    "end": (
        "sdxl",
        {"denoising_end": 1.5},
        "denoising_end: expected a number between 0 and 1, a part of the schedule, got 1.5",
    ),
    "start alone": (
        "sdxl",
        {"denoising_start": 0.5},
        "denoising_start: expected an image with it, the latents that are done so far, got none",
    ),
    "start after end": (
        "sdxl",
        {"denoising_start": 0.8, "denoising_end": 0.5, "image": PICTURE},
        "denoising_start: expected less than denoising_end, which is 0.5, got 0.8",
    ),
    "start and strength": (
        "sdxl",
        {"denoising_start": 0.8, "strength": 0.5, "image": PICTURE},
        "expected either strength or denoising_start, got both: each says where to begin",
    ),
    "nothing left": (
        "sdxl",
        {"denoising_start": 0.9999, "image": PICTURE},
        "denoising_start: of 8 steps none is left to take; give less",
    ),
    "nothing taken": (
        "sdxl",
        {"denoising_end": 0.0001},
        "denoising_end: of 8 steps none is to be taken; give more",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_calls(case):
    name, call, sentence = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        got(name, "snow", **call)
    assert str(caught.value).startswith(sentence)


def test_the_refiner_takes_scores_in_place_of_the_target():
    arguments = ours("sdxl-refiner").family_rules.arguments
    assert {"aesthetic_score", "negative_aesthetic_score"} <= set(arguments)
    assert not {"target_size", "negative_target_size", "prompt_2"} & set(arguments)


def changed(name: str = "sdxl", **configs) -> SimpleNamespace:
    """The pipeline with other values in the configurations of its parts, which stay as they are."""
    pipe = eager(name)
    parts = {}
    for part, config in configs.items():
        own = getattr(pipe, part)
        parts[part] = SimpleNamespace(**{"dtype": own.dtype, **vars_of(own), "config": with_values(own.config, config)})
    return SimpleNamespace(**{**pipe.components, **plain(name), **parts})


def vars_of(part) -> dict:
    return {"add_embedding": part.add_embedding} if hasattr(part, "add_embedding") else {}


def with_values(config, values: dict) -> SimpleNamespace:
    return SimpleNamespace(**{**dict(config), **values})


UNEXPORTABLE = {
    "distilled": (
        {"unet": {"time_cond_proj_dim": 256}},
        "unet.config.time_cond_proj_dim: expected none, got 256",
    ),
    "another kind": (
        {"unet": {"addition_embed_type": None}},
        "unet.config.addition_embed_type: expected 'text_time', as SDXL has it, got None",
    ),
    "inpainting": ({"unet": {"in_channels": 9}}, "unet.config.in_channels: expected the VAE's 4, got 9"),
    "sizes": (
        {"unet": {"addition_time_embed_dim": 16}},
        "unet.config.projection_class_embeddings_input_dim: expected 128, for 6 numbers of size, got 80",
    ),
}


@pytest.mark.parametrize("case", UNEXPORTABLE)
def test_models_that_are_called_in_another_way_are_refused(case):
    configs, sentence = UNEXPORTABLE[case]
    with pytest.raises(ExportError) as caught:
        sdxl.check_size(changed(**configs), SIZE)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (
            Size(30, 32, 16),
            "shapes.height, shapes.width: expected multiples of 8 (as StableDiffusionXLPipeline asks for), got 30 x 32; "
            "the nearest are 32 x 32",
        ),
        (
            Size(32, 32, 77),
            "shapes.max_sequence_length: expected 16, to which StableDiffusionXLPipeline pads, got 77",
        ),
    ],
)
def test_sizes_that_the_pipeline_would_not_draw_are_refused(size, sentence):
    with pytest.raises(ExportError) as caught:
        sdxl.check_size(eager("sdxl"), size)
    assert str(caught.value) == sentence


def test_a_vae_that_overflows_in_float16_is_refused():
    pipe = SimpleNamespace(**{**eager("sdxl").components, **plain("sdxl")})
    pipe.vae = copy.deepcopy(pipe.vae).to(torch.bfloat16)
    sdxl.check_size(pipe, SIZE)
    pipe.vae.to(torch.float16)
    with pytest.raises(ExportError) as caught:
        sdxl.check_size(pipe, SIZE)
    assert str(caught.value) == (
        'precision.vae: expected "float32" or "bfloat16", got "float16", in which this VAE overflows (its config says force_upcast)'
    )


def test_a_refiner_without_a_start_is_refused():
    with pytest.raises(ExportError, match="expected true, got false: StableDiffusionXLImg2ImgPipeline"):
        sdxl.other_components(eager("sdxl-refiner"), SIZE, channels_last=False)
    assert len(sdxl.other_components(eager("sdxl"), SIZE, channels_last=False)) == 2


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
