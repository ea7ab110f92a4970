"""Discover: the layout of every kind of denoiser, read off a run, and guidance that keeps the branches apart."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from prebake.exporter.caches import NoCache
from prebake.exporter.plan import make_plans
from prebake.exporter.sites.discover import discover_layout
from prebake.exporter.sites.guidance import LowPass
from support import cache_peers as peers
from support import tiny_denoisers as denoisers

ALL = denoisers.DITS | denoisers.UNETS


def test_flux_blocks_come_in_order_of_execution_with_their_streams():
    layout = discover_layout(denoisers.flux())
    assert [p.name for p in layout.blocks("")] == [
        "transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1",
    ]  # fmt: skip
    assert {p.streams for p in layout.blocks("")} == {("encoder_hidden_states", "hidden_states")}
    assert [p.streams for p in layout.attentions] == [
        ("hidden_states", "encoder_hidden_states"), ("hidden_states",), ("hidden_states",),
    ]  # fmt: skip
    assert layout.blocks("")[0].path == "model.transformer_blocks.0"


def test_each_branch_of_guidance_has_its_own_places():
    layout = discover_layout(denoisers.with_guidance(denoisers.pixart()))
    assert layout.branches == ("uncond", "cond")
    assert [p.site for p in layout.blocks("cond")] == ["cond/transformer_blocks.0", "cond/transformer_blocks.1"]
    assert {p.kind for p in layout.of("cross_attention", branch="uncond")} == {"cross_attention"}
    assert [p.name for p in layout.of("attention", branch="uncond")] == [
        p.name for p in layout.of("attention", branch="cond")
    ]


def test_sd3s_last_block_returns_no_text():
    last = discover_layout(denoisers.sd3()).blocks("")[-1]
    assert last.streams == ("", "hidden_states")
    assert last.mark().tensors == ("transformer_blocks.1:1",)


def test_a_unets_layers_are_listed_as_they_run():
    names = [p.name for p in discover_layout(denoisers.sd_unet()).of("layer") if p.name.startswith("up_blocks.3")]
    assert names[:4] == [
        "up_blocks.3.resnets.0",
        "up_blocks.3.attentions.0.transformer_blocks.0",
        "up_blocks.3.attentions.0",
        "up_blocks.3.resnets.1",
    ]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_guidance_in_two_calls_is_guidance_in_one_of_batch_2(name):
    component = denoisers.with_guidance(ALL[name](), planes=name != "flux")
    batched = peers.Batched(component)
    ours, theirs = component.module(*component.args), batched(*component.args)
    # float32 sums over another batch size
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-5)
    parameters = {p.data_ptr() for p in component.module.cond.parameters()}
    assert {p.data_ptr() for p in component.module.uncond.parameters()} == parameters


@pytest.mark.parametrize("name", ["cogvideox", "sd"])
def test_an_uncached_plan_is_the_peers_plain_run(name):
    component = denoisers.with_guidance(ALL[name]())
    table = peers.table_of(DDIMScheduler(clip_sample=False), 4)
    latents = torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(0))
    planned = make_plans(NoCache(), discover_layout(component), {4: table})
    ours = peers.ours(component, planned, planned.plans[0], latents)
    peer = peers.peer_replay(component, table, latents, lambda model, clock: None)
    assert ours.error(peer) < 1e-5
    assert len(peer.ran) == 4


@pytest.mark.parametrize("shape", [(16, 16), (12, 20), (15, 7), (5, 5), (64, 48)])
def test_low_pass_is_the_low_part_of_diffusers_split(shape):
    from diffusers.hooks.faster_cache import _split_low_high_freq

    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    theirs = torch.fft.ifft2(torch.fft.ifftshift(_split_low_high_freq(x)[0])).real
    assert torch.allclose(LowPass(*shape)(x), theirs, rtol=0, atol=2e-6)  # a sum of 3072 float32 products
