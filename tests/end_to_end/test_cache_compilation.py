"""What policies ask for survives compilation: one reuse schedule on every kind of denoiser, artifact code against eager."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from prebake.exporter.caches import Mask, PyramidAttentionBroadcast
from prebake.exporter.plan import make_plans
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.variant_compiler import compiled_run

CASES = {
    "flux": (Mask(mask="11(01)", order=1), False),
    "cogvideox": (PyramidAttentionBroadcast(spatial_attention_timestep_skip_range=(0, 999)), True),
    "sd3": (Mask(mask="1(01)"), True),
    "pixart": (PyramidAttentionBroadcast(spatial_attention_timestep_skip_range=(0, 999)), False),
}


@pytest.mark.compiles
@pytest.mark.slow  # `make test` does this on FLUX with an artifact: test_export.py
@pytest.mark.parametrize("name", CASES)
def test_compiled_variants_are_the_eager_ones(name):
    cache, with_guidance = CASES[name]
    component = (denoisers.DITS | denoisers.UNETS)[name]()
    component = denoisers.with_guidance(component) if with_guidance else component
    table = peers.table_of(DDIMScheduler(clip_sample=False), 6)
    latents = torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(0))
    planned = make_plans(cache, layout_of(component), {6: table})
    eager = peers.ours(component, planned, planned.plans[0], latents)
    artifact = compiled_run(name, component, planned, planned.plans[0], latents)
    # the compiler adds in another order; a wrong site or coefficient is off by 1e-2
    assert artifact.error(eager) < 2e-5
    uncached = peers.ours(component, planned, planned.plans[1], latents)
    assert uncached.error(eager) > 1e-4  # the cache did something
