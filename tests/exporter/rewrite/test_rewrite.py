"""Rewrites of the loaded model: fused and quantized layers compute the same, and what cannot be done is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prebake.exporter.families import flux
from prebake.exporter.lower import aoti, load_backend
from prebake.exporter.lower.w8a8 import W8A8Linear
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.rewrite import rewrite_pipeline
from prebake.exporter.rewrite.fuse import fuse_qkv
from prebake.exporter.rewrite.quantize import layer_role, quantize_model
from prebake.exporter.rewrite.refuse_hooks import refuse_hooked
from prebake.runtime.errors import ExportError

AOTI = load_backend("aoti")
SIZE = flux.Size(32, 32, 8)
NOTHING = ("fuse.qkv=false", "fuse.vae_qkv=false", "quantize.method=none")
FLOAT32 = ("precision.denoiser=float32", "precision.text_encoders=float32", "precision.vae=float32")


def recipe(*overrides: str):
    return resolve("flux-fast", ("cache.method=none", *FLOAT32, *overrides))


@torch.no_grad()
def velocity(pipe) -> torch.Tensor:
    denoiser = flux.denoiser(pipe, SIZE)
    return denoiser.module(*denoiser.args)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# fused projections


def test_fused_projections_compute_the_same_and_their_parts_are_gone(tiny_pipe):
    before = velocity(tiny_pipe)
    parameters = sum(p.numel() for p in tiny_pipe.transformer.parameters())
    assert fuse_qkv("transformer", tiny_pipe.transformer, key="fuse.qkv") == 3
    names = [n for n, _ in tiny_pipe.transformer.named_modules()]
    assert "transformer_blocks.0.attn.to_qkv" in names
    assert "transformer_blocks.0.attn.to_added_qkv" in names
    assert not any(n.endswith((".to_q", ".to_k", ".to_v", "_q_proj", "_k_proj", "_v_proj")) for n in names)
    assert sum(p.numel() for p in tiny_pipe.transformer.parameters()) == parameters
    # one matrix product of another shape adds in another order: float32 rounding, and no more
    assert relative_error(velocity(tiny_pipe), before) < 1e-5
    with torch.no_grad():  # the canary
        tiny_pipe.transformer.transformer_blocks[0].attn.to_qkv.weight[0] += 0.1
    assert relative_error(velocity(tiny_pipe), before) > 1e-4


def test_the_vae_decodes_the_same_with_fused_projections(tiny_pipe):
    vae = tiny_pipe.vae
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vae.decode(latents).sample
        assert fuse_qkv("vae", vae, key="fuse.vae_qkv") == 2  # the middle blocks of encoder and decoder
        # as above: another order of float32 sums
        assert relative_error(vae.decode(latents).sample, before) < 1e-5
        vae.decoder.mid_block.attentions[0].to_qkv.weight[-1] += 1.0  # the canary
        assert relative_error(vae.decode(latents).sample, before) > 1e-4


def test_a_model_without_fusing_is_refused():
    with pytest.raises(ExportError, match=r"fuse\.qkv.*set fuse\.qkv=false"):
        fuse_qkv("transformer", nn.Linear(1, 1), key="fuse.qkv")


class NothingToFuse(nn.Module):
    def fuse_qkv_projections(self) -> None:
        """Finds no attention, as diffusers does without a word."""


def test_a_model_in_which_nothing_was_fused_is_refused():
    with pytest.raises(
        ExportError,
        match=r"fuse\.vae_qkv.*set fuse\.vae_qkv=false",
    ):
        fuse_qkv("vae", NothingToFuse(), key="fuse.vae_qkv")


# int8

KINDS = {
    "time_text_embed.timestep_embedder.linear_1": "embedding",
    "context_embedder": "embedding",
    "x_embedder": "embedding",
    "transformer_blocks.0.norm1.linear": "modulation",
    "transformer_blocks.0.norm1_context.linear": "modulation",
    "single_transformer_blocks.11.norm.linear": "modulation",
    "norm_out.linear": "modulation",
    "proj_out": "final projection",
    "transformer_blocks.0.attn.to_qkv": "attention",
    "transformer_blocks.0.attn.to_out.0": "attention",
    "transformer_blocks.0.attn.to_add_out": "attention",
    "single_transformer_blocks.0.attn.to_q": "attention",
    "transformer_blocks.0.ff.net.0.proj": "feed-forward",
    "transformer_blocks.0.ff_context.net.2": "feed-forward",
    "single_transformer_blocks.0.proj_mlp": "feed-forward",
    "single_transformer_blocks.0.proj_out": "feed-forward",
    "something.else": "other",
}


@pytest.mark.parametrize(("name", "role"), KINDS.items())
def test_a_linears_kind_goes_by_its_place(name, role):
    assert layer_role(name) == role


def test_int8_takes_attention_and_feed_forward_and_says_why_it_leaves_the_rest(tiny_pipe):
    before = velocity(tiny_pipe)
    layers = rewrite_pipeline(tiny_pipe, recipe(), AOTI)
    linears = {n for n, m in tiny_pipe.transformer.named_modules() if isinstance(m, nn.Linear | W8A8Linear)}
    assert set(layers) == linears
    reasons = {why for what, why in layers.values() if what == "kept"}
    assert reasons == {"embedding", "modulation", "final projection"}
    assert {name for name, (what, _) in layers.items() if what == "int8"} == {
        n for n in linears if layer_role(n) in ("attention", "feed-forward")
    }
    assert layers["transformer_blocks.0.attn.to_qkv"] == ("int8", "attention, 64x192")
    assert not [
        n
        for n, p in tiny_pipe.transformer.named_parameters()
        if is_traceable_wrapper_subclass(p) or type(p) is not nn.Parameter
    ]
    codes = {n for n, t in tiny_pipe.transformer.state_dict().items() if t.dtype == torch.int8 and t.shape[-1] > 1}
    assert len(codes) == sum(what == "int8" for what, _ in layers.values())
    # 127 codes a sign: half a step is 1/254 of a row's largest value, and a few layers add theirs
    assert 1e-4 < relative_error(velocity(tiny_pipe), before) < 0.05


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"ff": nn.ModuleList([nn.Linear(64, 128)])})

    def forward(self, x):
        return self.block["ff"][0](x)


def test_one_int8_layer_is_within_its_rounding():
    model, x = FeedForward(), torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(x)
        assert quantize_model(model, recipe().quantize, 64, partial(aoti.quantize_layers, recipe=recipe())) == {
            "block.ff.0": ("int8", "feed-forward, 64x128")
        }
        # each factor is off by at most half of 1/127 of its row's largest value, evenly spread: about 1% in all
        assert 1e-4 < relative_error(model(x), exact) < 0.02
        model.block["ff"][0].bias += 0.1  # the canary
        assert relative_error(model(x), exact) > 0.02


def test_layers_below_the_ratio_are_kept_with_their_size():
    model = FeedForward()
    model.block["ff"].append(nn.Linear(128, 128))
    assert quantize_model(
        model, recipe("quantize.min_width_ratio=1.5").quantize, 64, partial(aoti.quantize_layers, recipe=recipe())
    ) == {
        "block.ff.0": ("kept", "feed-forward, 64x128 is smaller than 96"),
        "block.ff.1": ("int8", "feed-forward, 128x128"),
    }


def test_include_and_exclude_choose_by_name(tiny_pipe):
    layers = rewrite_pipeline(tiny_pipe, recipe("quantize.include=single_", "quantize.exclude=proj_mlp"), AOTI)
    assert layers["single_transformer_blocks.0.attn.to_qkv"][0] == "int8"
    assert layers["single_transformer_blocks.0.proj_mlp"] == ("kept", "quantize.exclude")
    assert layers["transformer_blocks.0.attn.to_qkv"] == ("kept", "not in quantize.include")


def test_quantizing_nothing_is_refused_with_the_reasons(tiny_pipe):
    with pytest.raises(
        ExportError,
        match=r"none of the model's 28 Linear .*relax quantize\.include",
    ):
        rewrite_pipeline(tiny_pipe, recipe("quantize.min_width_ratio=100"), AOTI)


def test_no_quantization_leaves_every_layer_and_says_so(tiny_pipe):
    before = velocity(tiny_pipe)
    layers = rewrite_pipeline(tiny_pipe, recipe(*NOTHING), AOTI)
    assert set(layers.values()) == {("kept", "quantize.method is none")}
    assert torch.equal(velocity(tiny_pipe), before)


def test_quantizing_leaves_inductors_flags_alone(tiny_pipe):
    import torch._inductor.config as config

    before = config.get_config_copy()
    rewrite_pipeline(tiny_pipe, recipe(), AOTI)
    assert config.get_config_copy() == before


# models that carry state


def test_a_diffusers_cache_hook_is_refused_by_name(tiny_pipe):
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(tiny_pipe.transformer, config)
    with pytest.raises(
        ExportError,
        match=r"attn carries .*pyramid_attention.*\[cache\] table",
    ):
        rewrite_pipeline(tiny_pipe, recipe(), AOTI)


def test_a_torch_hook_is_refused_by_place(tiny_pipe):
    tiny_pipe.vae.decoder.conv_in.register_forward_hook(lambda m, a, o: o)
    with pytest.raises(ExportError, match=r"vae\.decoder\.conv_in carries torch forward hooks"):
        rewrite_pipeline(tiny_pipe, recipe(), AOTI)


def test_a_pre_hook_is_refused_too():
    model = nn.Sequential(nn.Linear(1, 1))
    model.register_forward_pre_hook(lambda m, a: None)
    with pytest.raises(ExportError, match=r"^transformer carries torch forward hooks"):
        refuse_hooked("transformer", model)


def test_a_patched_forward_is_refused_by_place():
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].forward = lambda x: x
    with pytest.raises(ExportError, match=r"transformer\.0 has a patched forward \(<function .*\)"):
        refuse_hooked("transformer", model)


def test_a_clean_model_is_not_refused(tiny_pipe):
    refuse_hooked("transformer", tiny_pipe.transformer)
    tiny_pipe.vae.decoder.conv_in.register_forward_hook(lambda m, a, o: o).remove()
    refuse_hooked("vae", tiny_pipe.vae)
