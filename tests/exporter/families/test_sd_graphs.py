"""Stable Diffusion, exporter's side: the graphs compute what the pipeline does, and what cannot be exported is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from safetensors.torch import load_file
from torch import nn

from prebake.exporter.families import sd
from prebake.exporter.load.source import load_model
from prebake.exporter.lower import load_backend
from prebake.exporter.lower.w8a8 import W8A8Conv2d
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.rewrite import inner_width, rewrite_pipeline
from prebake.exporter.rewrite.quantize import layer_role
from prebake.exporter.settle import settle
from prebake.exporter.verify.options import VerifyOptions
from prebake.exporter.verify.verify import verify_artifact
from prebake.runtime.errors import ExportError
from support.kernel_cases import runs_here
from support.known_layouts import layout_of

AOTI = load_backend("aoti")
SIZE = sd.Size(32, 32, 16)
FLOAT32 = ("precision.denoiser=float32", "precision.text_encoders=float32", "precision.vae=float32")


def recipe(*overrides: str):
    return resolve("sd-fast", ("cache.method=none", *FLOAT32, *overrides))


@torch.no_grad()
def guided_sample(pipe) -> torch.Tensor:
    component = sd.denoiser(pipe, SIZE)
    return component.module(*component.args)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# --- graphs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_denoiser_is_the_pipelines_own_guidance(tiny_sd_pipe):
    component = sd.denoiser(tiny_sd_pipe, SIZE)
    latents, timestep, states, guidance, rescale = component.args
    names = ("hidden_states", "timestep", "encoder_hidden_states", "guidance_scale", "guidance_rescale")
    assert component.inputs == names
    sample = tiny_sd_pipe.unet(torch.cat([latents] * 2), timestep[0].long(), states[0], return_dict=False)[0]
    uncond, cond = sample.chunk(2)
    guided = rescale_noise_cfg(uncond + guidance * (cond - uncond), cond, float(rescale))
    # two images one by one against a batch of two: float32 sums in another order
    assert relative_error(guided_sample(tiny_sd_pipe), guided) < 1e-5
    tiny_sd_pipe.unet.conv_out.bias += 0.01  # the canary
    assert relative_error(guided_sample(tiny_sd_pipe), guided) > 1e-4


@torch.no_grad()
def test_in_bfloat16_neighbouring_timesteps_stay_apart(tiny_sd_pipe):
    """Rounded before the sinusoid, 975 and 976 would both be 976."""
    tiny_sd_pipe.unet.to(torch.bfloat16)
    component = sd.denoiser(tiny_sd_pipe, SIZE)
    latents, _, *rest = component.args
    a, b = (component.module(latents, torch.tensor([t]), *rest) for t in (975.0, 976.0))
    assert a.dtype == torch.float32
    assert not torch.equal(a, b)


def test_the_layout_has_both_branches(tiny_sd_pipe):
    layout = layout_of(sd.denoiser(tiny_sd_pipe, SIZE))
    assert layout.branches == ("uncond", "cond")
    attentions = [[p.name for p in layout.attentions if p.branch == b] for b in layout.branches]
    assert attentions[0] == attentions[1]
    assert len(attentions[0]) == 8  # self and cross, in 1 + 1 + 2 transformer blocks


# --- rewrites -------------------------------------------------------------------------------------------------------


def test_fused_projections_compute_the_same(tiny_sd_pipe):
    before = guided_sample(tiny_sd_pipe)
    _ = rewrite_pipeline(tiny_sd_pipe, recipe(), AOTI)
    names = [n for n, _ in tiny_sd_pipe.unet.named_modules()]
    assert any(n.endswith("attn1.to_qkv") for n in names)
    assert any(n.endswith("attn2.to_kv") for n in names)
    assert not any(n.endswith(("attn1.to_q", ".to_k", ".to_v")) for n in names)
    # one matrix product of another shape adds in another order
    assert relative_error(guided_sample(tiny_sd_pipe), before) < 1e-5


def test_convolutions_lie_as_inductor_reads_them(tiny_sd_pipe):
    _ = rewrite_pipeline(tiny_sd_pipe, recipe(), AOTI)
    kernels = [m.weight for m in tiny_sd_pipe.unet.modules() if isinstance(m, nn.Conv2d)]
    assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)


KINDS = {
    "time_embedding.linear_1": "embedding",
    "down_blocks.0.resnets.0.time_emb_proj": "modulation",
    "down_blocks.0.attentions.0.proj_in": "attention",
    "up_blocks.1.attentions.2.proj_out": "attention",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv": "attention",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_kv": "attention",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": "feed-forward",
}


@pytest.mark.parametrize(("name", "role"), KINDS.items())
def test_a_linears_kind_goes_by_its_place(name, role):
    assert layer_role(name) == role


def test_int8_is_measured_by_the_unets_first_level(tiny_sd_pipe):
    before = guided_sample(tiny_sd_pipe)
    assert inner_width(tiny_sd_pipe.unet) == 16
    layers = rewrite_pipeline(tiny_sd_pipe, recipe("quantize.method=int8_dynamic"), AOTI)
    treated = {name for name, (what, _) in layers.items() if what == "int8"}
    assert treated == {n for n in layers if layer_role(n) in ("attention", "feed-forward")}
    assert layers["down_blocks.0.resnets.0.time_emb_proj"] == ("kept", "modulation")
    # int8 rounds to 1/127 of a row's or a token's largest value
    assert 0 < relative_error(guided_sample(tiny_sd_pipe), before) < 0.05


@runs_here
def test_int8_convolutions_are_those_between_the_first_and_the_last(tiny_sd_pipe):
    before = guided_sample(tiny_sd_pipe)
    layers = rewrite_pipeline(tiny_sd_pipe, recipe("quantize.method=int8_dynamic", "quantize.convolutions=true"), AOTI)
    convolutions = {n: m for n, m in tiny_sd_pipe.unet.named_modules() if isinstance(m, W8A8Conv2d)}
    assert {layer_role(n) for n in convolutions} == {"convolution", "attention"}
    assert {n for n in layers if layer_role(n) == "convolution"} < convolutions.keys()
    assert layers["down_blocks.0.resnets.0.conv1"] == ("int8", "convolution, 16x16")
    assert layers["conv_in"] == ("kept", "embedding")
    assert layers["conv_out"] == ("kept", "final projection")
    names = {"conv", "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"}
    assert {n.rpartition(".")[2] for n in convolutions} == names
    # as with Linears alone, in as many layers again
    assert 0 < relative_error(guided_sample(tiny_sd_pipe), before) < 0.1


def test_int8_leaves_alone_what_is_narrow(tiny_sd_pipe):
    layers = rewrite_pipeline(tiny_sd_pipe, recipe("quantize.method=int8_dynamic", "quantize.min_width_ratio=2"), AOTI)
    assert layers["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"] == (
        "kept",
        "attention, 16x16 is smaller than 32",
    )
    assert layers["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"][0] == "int8"


# --- what is exported, and what is not --------------------------------------------------------------------------------


def test_where_nothing_is_asked_for_the_model_decides_and_then_diffusers(tiny_sd_folder):
    loaded = load_model(str(tiny_sd_folder), None, {"default": torch.float32})
    usual, size, steps = settle(recipe(), sd, loaded)
    assert (usual.height, usual.width, size.tokens) == (32, 32, 16)  # sample_size x the VAE's 2, and the tokenizer's
    assert (steps, usual.guidance_scale) == ((4,), 3.0)
    silent, _, steps = settle(recipe(), sd, replace(loaded, defaults={}))
    assert (steps, silent.guidance_scale) == ((50,), 7.5)


REFUSED = {
    "height": (
        "shapes.height=36",
        "shapes.height, shapes.width: expected multiples of 8 (as StableDiffusionPipeline asks for), got 36 x 32; the nearest are 32 x 32",
    ),
    "tokens": (
        "shapes.max_sequence_length=8",
        "shapes.max_sequence_length: expected 16, to which StableDiffusionPipeline pads, got 8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_size_that_the_pipeline_does_not_draw_is_refused(name, tiny_sd_folder):
    override, words = REFUSED[name]
    with pytest.raises(ExportError) as caught:
        settle(recipe(override), sd, load_model(str(tiny_sd_folder), None, {"default": torch.float32}))
    assert str(caught.value) == words


def test_a_unet_with_guidance_of_its_own_is_refused(tiny_sd_pipe):
    tiny_sd_pipe.unet.register_to_config(time_cond_proj_dim=32)
    with pytest.raises(ExportError, match=r"time_cond_proj_dim: expected none, got 32: .*guidance"):
        sd.check_size(tiny_sd_pipe, SIZE)


def test_a_text_encoder_with_a_mask_is_refused(tiny_sd_pipe):
    tiny_sd_pipe.text_encoder.config.use_attention_mask = True
    with pytest.raises(ExportError, match=r"use_attention_mask: expected false, got true"):
        sd.check_size(tiny_sd_pipe, SIZE)


def test_the_reference_is_drawn_without_the_safety_checker(tiny_sd_pipe):
    checker = nn.Identity()  # would not answer as a checker does
    tiny_sd_pipe.safety_checker = checker
    _, image = sd.draw(tiny_sd_pipe, "a red circle", 0, 2, 3.0, SIZE)
    assert image.shape == (1, 3, 32, 32)
    assert tiny_sd_pipe.safety_checker is checker


# --- the artifact -----------------------------------------------------------------------------------------------------


def test_golden_vectors_hold_both_prompts(tiny_sd_artifact):
    golden = load_file(tiny_sd_artifact / "golden" / "4.safetensors")
    texts = [golden["input_ids.0.input_ids"], golden["input_ids.1.input_ids"]]
    assert texts[0].shape == texts[1].shape == (1, 16)
    assert not torch.equal(*texts)


def test_verify_with_the_source_passes(tiny_sd_artifact, tiny_sd_folder):
    from prebake.exporter.progress import open_progress

    with open_progress("quiet") as quiet:
        _, outcome = verify_artifact(
            tiny_sd_artifact, VerifyOptions(with_source=True, model=str(tiny_sd_folder)), quiet
        )
    assert outcome.missed == ()
    assert {v.figure for v in outcome.verdicts} == {
        "evaluation_error",
        "worst_evaluation_error",
        "picture_error",
        "worst_picture_error",
        "plan_error",
        "weight_error",
    }
