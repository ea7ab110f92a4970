"""What artifacts and exports of Stable Diffusion XL refuse, by name."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from prebake.exporter.families import sdxl
from prebake.exporter.families.picture import Size
from prebake.runtime.errors import ExportError, RequestError
from support.family_parity import (
    PICTURE,
    eager,
    got,
    ours,
)
from support.sdxl_calls import SIZE, plain

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
