"""Cache policies against their authors: the sites that compute, and the trajectory that results."""

from __future__ import annotations

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks import HookRegistry

from prebake.exporter.caches import Trajectory, schedule
from prebake.exporter.calibrators.eager_replay import eager_replay
from prebake.exporter.families import flux
from prebake.exporter.plan import make_plans
from prebake.exporter.plan.sampler import tabulate_scheduler
from prebake.exporter.recipe.resolve import Mask, PyramidAttentionBroadcast
from prebake.runtime.errors import ExportError
from support.known_layouts import layout_of

SIZE = flux.Size(32, 32, 8)


def planned(pipe, cache, steps: int):
    table = tabulate_scheduler(
        pipe.scheduler,
        steps,
        **flux.scheduler_arguments(pipe.scheduler, flux.facts(pipe, SIZE)["latents_shape"], steps),
    )
    return make_plans(cache, layout_of(flux.denoiser(pipe, SIZE)), {steps: table}), table


def inputs_of(denoiser) -> dict[str, torch.Tensor]:
    return {n: t for n, t in zip(denoiser.inputs, denoiser.args, strict=True) if n not in ("hidden_states", "timestep")}


class Recorder:
    """Which attention modules of a pipeline really ran, evaluation by evaluation."""

    def __init__(self, pipe) -> None:
        self.ran: list[set[str]] = []
        for attention in layout_of(flux.denoiser(pipe, SIZE)).attentions:
            module = pipe.transformer.get_submodule(attention.name)
            self.watch(module, attention.name)
        pipe.transformer.x_embedder.register_forward_hook(lambda *_: self.ran.append(set()))

    def watch(self, module, name: str) -> None:
        inner = module.processor

        class Watched(type(inner)):
            def __call__(watched, *args, **kwargs):
                self.ran[-1].add(name)
                return inner(*args, **kwargs)

        module.processor = Watched()


def diffusers_pab(pipe, denoiser, cache, steps: int, latents) -> torch.Tensor:
    """diffusers' own run with its own hooks, all in eager."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=cache.spatial_attention_block_skip_range,
        spatial_attention_timestep_skip_range=cache.spatial_attention_timestep_skip_range,
        spatial_attention_block_identifiers=cache.spatial_attention_block_identifiers,
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    if not hasattr(type(pipe), "current_timestep"):
        type(pipe).current_timestep = property(lambda self: self._current_timestep)
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    given = dict(zip(denoiser.inputs, denoiser.args, strict=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=given["encoder_hidden_states"],
        pooled_prompt_embeds=given["pooled_projections"],
        guidance_scale=3.5,
        height=32,
        width=32,
        num_inference_steps=steps,
        latents=latents,
        output_type="latent",
    ).images


CASES = [(8, 2, (100, 800)), (12, 3, (100, 1000)), (5, 2, (0, 1000)), (28, 6, (200, 900)), (7, 9, (50, 990))]


@pytest.mark.parametrize(("steps", "every", "window"), CASES)
def test_pab_computes_the_sites_and_reaches_the_latents_of_diffusers(tiny_pipe, steps, every, window):
    cache = PyramidAttentionBroadcast(
        spatial_attention_block_skip_range=every, spatial_attention_timestep_skip_range=window
    )
    ours, table = planned(tiny_pipe, cache, steps)
    denoiser = flux.denoiser(tiny_pipe, SIZE)
    latents = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(steps))
    replayed = eager_replay(denoiser, ours, ours.plans[0], inputs_of(denoiser), latents, timestep_scale=1e-3)

    decisions = schedule(cache, layout_of(flux.denoiser(tiny_pipe, SIZE)), Trajectory(table.timesteps)).decisions

    recorder = Recorder(tiny_pipe)
    peer = diffusers_pab(tiny_pipe, denoiser, cache, steps, latents)
    every = set(recorder.ran[0])
    assert [{s for s in every if d.actions.get(s, "compute") == "compute"} for d in decisions] == recorder.ran
    # float32 through up to 28 evaluations whose steps are summed in another order; a wrong step is off by 1e-2
    assert torch.allclose(replayed, peer, rtol=0, atol=2e-5)


def test_the_comparison_with_diffusers_can_fail(tiny_pipe):
    cache = PyramidAttentionBroadcast(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000)
    )
    ours, _ = planned(tiny_pipe, cache, 8)
    denoiser = flux.denoiser(tiny_pipe, SIZE)
    latents = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(8))
    other = cache.model_copy(update={"spatial_attention_block_skip_range": 3})
    replayed = eager_replay(denoiser, ours, ours.plans[0], inputs_of(denoiser), latents, timestep_scale=1e-3)
    assert not torch.allclose(replayed, diffusers_pab(tiny_pipe, denoiser, other, 8, latents), rtol=0, atol=2e-5)


def test_an_uncached_plan_is_the_plain_pipeline(tiny_pipe):
    ours, _ = planned(tiny_pipe, Mask(mask="11(01)", order=1), 9)
    denoiser = flux.denoiser(tiny_pipe, SIZE)
    latents = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1))
    uncached = next(p for p in ours.plans if p.name == "9-uncached")
    replayed = eager_replay(denoiser, ours, uncached, inputs_of(denoiser), latents, timestep_scale=1e-3)
    given = dict(zip(denoiser.inputs, denoiser.args, strict=True))
    tiny_pipe.set_progress_bar_config(disable=True)
    peer = tiny_pipe(
        prompt_embeds=given["encoder_hidden_states"], pooled_prompt_embeds=given["pooled_projections"],
        guidance_scale=3.5, height=32, width=32, num_inference_steps=9, latents=latents, output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(replayed, peer, rtol=0, atol=2e-5)  # as above
    assert HookRegistry  # diffusers' hooks were importable, so the test above ran against them


def test_plans_never_read_what_was_not_stored_and_every_variant_exists(tiny_pipe):
    for cache in (Mask(mask="1(0001)"), Mask(mask="111(01)", order=1), PyramidAttentionBroadcast()):
        ours, _ = planned(tiny_pipe, cache, 10)
        combining = {v.name: v.sites_with("combine") for v in ours.variants}
        storing = {v.name: v.sites_with("compute") for v in ours.variants}
        for p in ours.plans:
            stored: set[str] = set()
            for e in p.evaluations:
                assert stored.issuperset(combining[e.variant])
                stored.update(storing[e.variant])


def test_identifiers_that_match_nothing_are_refused_with_the_attentions_that_exist(tiny_pipe):
    cache = PyramidAttentionBroadcast(spatial_attention_block_identifiers=("temporal",))
    with pytest.raises(ExportError, match=r"\['temporal'\] match .*; it has transformer_blocks\.0\.attn"):
        planned(tiny_pipe, cache, 8)


def test_a_cache_that_skips_nothing_is_refused(tiny_pipe):
    cache = PyramidAttentionBroadcast(spatial_attention_timestep_skip_range=(0, 1))
    with pytest.raises(ExportError, match="'pab' skips nothing at 8 steps; widen its range"):
        planned(tiny_pipe, cache, 8)
