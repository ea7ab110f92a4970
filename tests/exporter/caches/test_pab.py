"""Pyramid Attention Broadcast against diffusers' own hooks: which attentions run, and what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from prebake.exporter.caches import PyramidAttentionBroadcast, Trajectory, schedule
from prebake.exporter.plan import make_plans
from prebake.exporter.sites.layout import Layout, Place
from prebake.runtime.errors import ExportError
from support import cache_peers as peers
from support import skeleton_models as skeletons
from support import tiny_denoisers as denoisers
from support.known_layouts import LayoutTable, layout_of
from support.variant_compiler import compiled_run

# float32 through up to 16 evaluations, the two halves of a batch run apart: up to 1.2e-6 was seen; a wrong site or step
# is off by 1e-2
CLOSE = 5e-6
MADE = {
    "flux": denoisers.flux(),
    "cogvideox": denoisers.with_guidance(denoisers.cogvideox()),
    "sd3": denoisers.with_guidance(denoisers.sd3()),
    "pixart": denoisers.with_guidance(denoisers.pixart()),
}
LAYOUTS = LayoutTable(MADE)
KEYS = [k for k in PyramidAttentionBroadcast.model_fields if k != "method"]


def peer_of(cache: PyramidAttentionBroadcast):
    """Puts diffusers' hooks on with the same parameters."""

    def apply(model, clock):
        config = PyramidAttentionBroadcastConfig(
            **{k: getattr(cache, k) for k in KEYS}, current_timestep_callback=clock
        )
        apply_pyramid_attention_broadcast(model, config)

    return apply


def ran(name: str, cache: PyramidAttentionBroadcast, timesteps) -> list[set[str]]:
    return skeletons.ran(skeletons.model_of(MADE[name]), names(name), timesteps, peer_of(cache))


def names(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(a.name for a in LAYOUTS[name].attentions))


windows = st.tuples(st.integers(-1, 1001), st.integers(-1, 1001)).filter(lambda w: w[0] < w[1])
ranges = st.none() | st.integers(2, 9)


@st.composite
def caches(draw, name: str) -> PyramidAttentionBroadcast:
    given: dict[str, Any] = {
        "spatial_attention_block_skip_range": draw(ranges),
        "spatial_attention_timestep_skip_range": draw(windows),
        "spatial_attention_block_identifiers": draw(
            st.sampled_from([("blocks",), (r"blocks\.0\.", r"blocks\.1\."), (r"\.0\.attn",)])
        ),
    }
    if name == "pixart":
        given["cross_attention_block_skip_range"] = draw(ranges)
        given["cross_attention_timestep_skip_range"] = draw(windows)
        given["cross_attention_block_identifiers"] = draw(st.sampled_from([("blocks",), (r"\.1\.attn2",)]))
    if draw(st.booleans()) and given["spatial_attention_block_skip_range"] is None:
        given["temporal_attention_block_skip_range"] = draw(st.integers(2, 9))
        given["temporal_attention_timestep_skip_range"] = draw(windows)
        given["temporal_attention_block_identifiers"] = (r"blocks\.\d+\.attn1?$",)
    return PyramidAttentionBroadcast(**given)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(sorted(MADE)), st.sampled_from(sorted(skeletons.SCHEDULERS)), st.integers(1, 50))
def test_the_attentions_that_compute_are_those_that_diffusers_runs(data, name, scheduler, steps):
    cache = data.draw(caches(name))
    timesteps = skeletons.SCHEDULERS[scheduler](steps)
    ours = schedule(cache, LAYOUTS[name], Trajectory(timesteps))
    theirs = ran(name, cache, timesteps)
    for branch in LAYOUTS[name].branches:
        assert skeletons.computed(ours, names(name), branch) == theirs


def test_without_any_range_spatial_attention_has_2_as_diffusers_warns():
    timesteps = skeletons.SCHEDULERS["ddim"](50)
    ours = schedule(PyramidAttentionBroadcast(), LAYOUTS["pixart"], Trajectory(timesteps))
    theirs = ran("pixart", PyramidAttentionBroadcast(), timesteps)
    assert skeletons.computed(ours, names("pixart"), "cond") == theirs
    spatial = ["transformer_blocks.0.attn1" in step for step in theirs]
    assert "".join("01"[s] for s in spatial) == "11111111111" + "01" * 17 + "11111"
    assert all("transformer_blocks.0.attn2" in step for step in theirs)


ALL = (-1, 1001)
RUNS: dict[str, tuple[str, PyramidAttentionBroadcast, Any, int]] = {
    "flux": (
        "flux",
        PyramidAttentionBroadcast(spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_range=ALL),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        12,
    ),
    "cogvideox, defaults": ("cogvideox", PyramidAttentionBroadcast(), DDIMScheduler(clip_sample=False), 16),
    "sd3, one block": (
        "sd3",
        PyramidAttentionBroadcast(
            spatial_attention_block_skip_range=4,
            spatial_attention_timestep_skip_range=(50, 990),
            spatial_attention_block_identifiers=(r"transformer_blocks\.1",),
        ),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        9,
    ),
    "pixart, self and cross apart": (
        "pixart",
        PyramidAttentionBroadcast(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 900),
            cross_attention_block_skip_range=3,
            cross_attention_timestep_skip_range=ALL,
        ),
        DDIMScheduler(clip_sample=False),
        10,
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_replay_is_diffusers_run(case):
    name, cache, scheduler, steps = RUNS[case]
    component, table, latents, scale = setting(name, scheduler, steps)
    planned = make_plans(cache, LAYOUTS[name], {steps: table})
    ours = peers.ours(component, planned, planned.plans[0], latents, timestep_scale=scale)
    theirs = peers.peer_replay(component, table, latents, peer_of(cache), timestep_scale=scale)
    assert ours.error(theirs) < CLOSE
    assert torch.allclose(ours.latents, theirs.latents, rtol=0, atol=CLOSE * float(theirs.latents.abs().max()))
    decided = schedule(cache, LAYOUTS[name], Trajectory(table.timesteps))
    for branch in LAYOUTS[name].branches:
        assert skeletons.computed(decided, names(name), branch) == [r & set(names(name)) for r in theirs.ran]


def test_the_comparison_can_fail():
    component, table, latents, _ = setting("cogvideox", DDIMScheduler(clip_sample=False), 8)
    cache = PyramidAttentionBroadcast(spatial_attention_timestep_skip_range=ALL)
    planned = make_plans(cache, LAYOUTS["cogvideox"], {8: table})
    ours = peers.ours(component, planned, planned.plans[0], latents)
    other = cache.model_copy(update={"spatial_attention_timestep_skip_range": (300, 1001)})
    assert ours.error(peers.peer_replay(component, table, latents, peer_of(other))) > 10 * CLOSE


def test_an_uncached_plan_is_the_plain_model():
    component, table, latents, _ = setting("pixart", DDIMScheduler(clip_sample=False), 5)
    cache = PyramidAttentionBroadcast(spatial_attention_timestep_skip_range=ALL)
    planned = make_plans(cache, LAYOUTS["pixart"], {5: table})
    ours = peers.ours(component, planned, planned.plans[1], latents)
    assert ours.error(peers.peer_replay(component, table, latents, lambda model, clock: None)) < CLOSE


@pytest.mark.slow
@pytest.mark.compiles
def test_the_artifact_is_the_replay():
    _, cache, scheduler, steps = RUNS["pixart, self and cross apart"]
    one = denoisers.pixart(layers=1)
    table = peers.table_of(scheduler, steps)
    latents = denoisers.noise(*one.args[0].shape)
    planned = make_plans(cache, layout_of(one), {steps: table})
    assert len(planned.variants) == 4  # all; self, cross, or both reused
    eager = peers.ours(one, planned, planned.plans[0], latents)
    assert (
        compiled_run("pixart, one block", one, planned, planned.plans[0], latents).error(eager) < 2e-5
    )  # the compiler adds in another order


def test_branches_in_two_calls_share_diffusers_state_but_not_ours():
    """On purpose: diffusers keeps one state for both calls of sequential guidance. With cond first, as Wan's pipeline
    calls, the count is even there, so cond computes every time and uncond returns what cond has just computed."""
    component, table, latents, _ = setting("cogvideox", DDIMScheduler(clip_sample=False), 6)
    cache = PyramidAttentionBroadcast(spatial_attention_timestep_skip_range=ALL)
    own = peers.inputs_of(component)
    one = copy.deepcopy(component.module.cond)
    attention = one.get_submodule("model.transformer_blocks.0.attn1")
    clock, outputs, computing = peers.Clock(table), [], []
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: (computing.append(len(outputs)), inner(*args, **kwargs))[1]
    peer_of(cache)(one.model, clock)
    attention.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        for clock.e in range(6):
            for half in (1, 0):  # cond, then uncond
                one(latents, torch.tensor([table.timesteps[clock.e]]), own["encoder_hidden_states"][:, half])
    assert computing == [0, 2, 4, 6, 8, 10]  # never an uncond call
    assert all(torch.equal(a, b) for a, b in zip(outputs[1][0], outputs[0][0], strict=True))

    decided = schedule(cache, LAYOUTS["cogvideox"], Trajectory(table.timesteps))
    at = [
        [d.actions.get(f"{b}/transformer_blocks.0.attn1", "compute") for d in decided.decisions]
        for b in ("uncond", "cond")
    ]
    assert at[0] == at[1] == ["compute", "combine"] * 3


def test_temporal_identifiers_that_spatial_ones_take_first_are_refused():
    """On purpose: diffusers lets the spatial range win there, and never says that the temporal one does nothing."""
    places = tuple(
        Place(n, "", n, "attention", ("hidden_states",))
        for n in ("transformer_blocks.0.attn1", "temporal_transformer_blocks.0.attn1")
    )
    both = PyramidAttentionBroadcast(
        spatial_attention_block_skip_range=2, temporal_attention_block_skip_range=4,
        spatial_attention_timestep_skip_range=ALL, temporal_attention_timestep_skip_range=ALL,
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"temporal_attention_block.* those come first: temporal_t"):
        schedule(both, Layout(places), Trajectory((900.0, 800.0)))
    apart = both.model_copy(update={"spatial_attention_block_identifiers": ("^transformer_blocks",)})
    got = schedule(apart, Layout(places), Trajectory((900.0, 800.0, 700.0, 600.0)))
    assert [sorted(n.partition("_")[0] for n in d.actions) for d in got.decisions] == [
        [], ["temporal", "transformer"], ["temporal"], ["temporal", "transformer"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "chosen", "sentence"),
    [
        ("flux", {"cross_attention_block_skip_range": 2}, "match no cross attention of the model; it has none"),
        (
            "pixart",
            {"spatial_attention_block_identifiers": ("blocks", "layrs")},
            r"cache\.spatial_attention_block_identifiers \['layrs'\] match no attention of the model; it has transformer_blocks\.0\.attn1, ",
        ),
        ("sd3", {"temporal_attention_block_skip_range": 2}, r"\['temporal_transformer_blocks'\] match no attention"),
    ],
)
def test_identifiers_without_an_attention_are_refused_with_those_that_exist(name, chosen, sentence):
    with pytest.raises(ExportError, match=sentence):
        schedule(PyramidAttentionBroadcast(**chosen), LAYOUTS[name], Trajectory((900.0, 500.0)))


def setting(name: str, scheduler: Any, steps: int):
    component = MADE[name]
    scale = 1e-3 if name == "flux" else 1.0
    return component, peers.table_of(scheduler, steps), denoisers.noise(*component.args[0].shape), scale
