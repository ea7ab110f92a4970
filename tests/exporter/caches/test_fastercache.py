"""FasterCache against diffusers' own hooks: which attentions and branches run, and what stands in for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    FasterCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    apply_faster_cache,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prebake.exporter.caches import FasterCache, Trajectory, schedule
from prebake.exporter.capture.variants import capture_variants
from prebake.exporter.cost.count import count_attention_ops, count_cost, module_flops
from prebake.exporter.cost.variants import check_variant_costs
from prebake.exporter.plan import make_plans
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.sites.guidance import add_planes
from prebake.exporter.sites.layout import Layout, Place
from prebake.runtime.errors import ExportError, RecipeError
from support import cache_peers as peers
from support import skeleton_models as skeletons
from support import tiny_denoisers as denoisers
from support.known_layouts import LayoutTable, layout_of
from support.variant_compiler import compiled_run

# float32 through up to 16 evaluations, where diffusers goes through a Fourier transform and back: up to 1.2e-6 was seen; a
# wrong step or weight is off by 3e-5 at the least
CLOSE = 5e-6
MADE = {
    "flux": denoisers.flux(),
    "cogvideox": denoisers.with_guidance(denoisers.cogvideox(), planes=True),
    "sd3": denoisers.with_guidance(denoisers.sd3(), planes=True),
    "pixart": denoisers.with_guidance(denoisers.pixart(), planes=True),
}
LAYOUTS = LayoutTable(MADE)
FORMATS = {"flux": "BCHW", "cogvideox": "BFCHW", "sd3": "BCHW", "pixart": "BCHW"}
WEIGHTS = ("attention_weight", "low_frequency_weight", "high_frequency_weight")
KEYS = [k for k in FasterCache.model_fields if k not in ("method", *WEIGHTS)]
SPLIT = ("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections")
"""The inputs that hold both halves: diffusers' own list lacks SD3's pooled_projections."""


def peer_of(cache: FasterCache, batches: list[int] | None = None, **others: Any):
    """Puts diffusers' hooks on with the same parameters; `batches` is told how many halves each evaluation runs."""

    def callback(key: str, clock):
        value = getattr(cache, key)
        return None if value is None else lambda _: value[clock.e] if isinstance(value, tuple) else value

    def apply(model, clock):
        given = {k: getattr(cache, k) for k in KEYS}
        given |= {f"{k}_callback": callback(k, clock) for k in WEIGHTS}
        given |= {"_unconditional_conditional_input_kwargs_identifiers": SPLIT, "current_timestep_callback": clock}
        apply_faster_cache(model, FasterCacheConfig(**(given | others)))
        if batches is not None:
            model.proj_out.register_forward_hook(lambda module, args, output: batches.append(len(output)))

    return apply


def names(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(a.name for a in LAYOUTS[name].attentions))


windows = st.tuples(st.integers(-1, 1001), st.integers(-1, 1001)).filter(lambda w: w[0] < w[1])
POLICIES = st.fixed_dictionaries(
    {
        "spatial_attention_block_skip_range": st.integers(1, 6),
        "spatial_attention_timestep_skip_range": windows,
        "spatial_attention_block_identifiers": st.sampled_from(
            [FasterCache().spatial_attention_block_identifiers, (r"\.0\.attn",)]
        ),
        "unconditional_batch_skip_range": st.integers(1, 8),
        "unconditional_batch_timestep_skip_range": windows,
    }
)


@settings(deadline=None, max_examples=150)
@given(POLICIES, st.sampled_from(sorted(MADE)), st.sampled_from(sorted(skeletons.SCHEDULERS)), st.integers(1, 40))
def test_attentions_and_branches_compute_where_diffusers_runs_them(policy, name, scheduler, steps):
    distilled = name == "flux"
    cache = FasterCache(**policy, is_guidance_distilled=distilled, tensor_format="BCHW")
    timesteps = skeletons.SCHEDULERS[scheduler](steps)
    low, high = cache.spatial_attention_timestep_skip_range
    assume(not (distilled and low < timesteps[0] < high))  # diffusers raises: see below
    ours = schedule(cache, LAYOUTS[name], Trajectory(timesteps))
    model = skeletons.model_of(MADE[name])
    theirs = skeletons.ran(model, names(name), timesteps, peer_of(cache), batch=1 if distilled else 2)
    cond = skeletons.computed(ours, names(name), "" if distilled else "cond")
    assert cond == [step - {"uncond"} for step in theirs]
    if not distilled:
        assert [d.actions.get("low", "compute") == "compute" for d in ours.decisions] == ["uncond" in s for s in theirs]
        assert all(d.actions.get("low") == d.actions.get("high") for d in ours.decisions)


def test_50_steps_of_ddim_compute_as_the_defaults_say():
    timesteps = skeletons.SCHEDULERS["ddim"](50)
    ours = schedule(FasterCache(), LAYOUTS["cogvideox"], Trajectory(timesteps))
    both = [not d.actions for d in ours.decisions]
    assert "".join("01"[b] for b in both) == "1" * 17 + "000" + "10000" * 6
    # weights multiply up over consecutive skips, each in its own window of timesteps
    first, last = ours.decisions[21], ours.decisions[49]
    assert timesteps[21] == 560
    assert (first.coefficients["low"], first.coefficients["high"]) == ((1.1,), (1.0,))
    assert (last.coefficients["low"], last.coefficients["high"]) == ((1.0,), pytest.approx((1.1**4,)))


FLOW, DDIM = FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler(clip_sample=False)
RUNS: dict[str, tuple[str, FasterCache, Any, int]] = {
    "flux": ("flux", FasterCache(is_guidance_distilled=True), FLOW, 14),
    "flux, a ramp of weights": (
        "flux",
        FasterCache(
            is_guidance_distilled=True, attention_weight=tuple(e / 12 for e in range(12)),
            spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_range=(100, 999),
        ),
        FLOW, 12,
    ),
    "cogvideox": ("cogvideox", FasterCache(tensor_format="BFCHW"), CogVideoXDDIMScheduler(clip_sample=False), 16),
    "cogvideox, other weights": (
        "cogvideox",
        FasterCache(
            tensor_format="BFCHW", low_frequency_weight=0.9, high_frequency_weight=(1.2, 1.0) * 5,
            unconditional_batch_timestep_skip_range=(-1, 1000), unconditional_batch_skip_range=3, attention_weight=0.3,
        ),
        DDIM, 10,
    ),
    "pixart": (
        "pixart",
        FasterCache(
            tensor_format="BCHW", alpha_low_frequency=1.2, alpha_high_frequency=0.8,
            spatial_attention_timestep_skip_range=(100, 500), spatial_attention_block_skip_range=3,
        ),
        DDIM, 15,
    ),
    "sd3, one block": (
        "sd3",
        FasterCache(tensor_format="BCHW", spatial_attention_block_identifiers=(r"blocks\.1",)),
        FLOW, 14,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_replay_is_diffusers_run(case):
    name, cache, scheduler, steps = RUNS[case]
    component, table, latents, scale = setting(name, scheduler, steps)
    planned = make_plans(cache, LAYOUTS[name], {steps: table})
    ours = peers.ours(component, planned, planned.plans[0], latents, timestep_scale=scale)
    batches: list[int] = []
    theirs = peers.peer_replay(component, table, latents, peer_of(cache, batches), timestep_scale=scale)
    assert ours.error(theirs) < CLOSE
    assert torch.allclose(ours.latents, theirs.latents, rtol=0, atol=CLOSE * float(theirs.latents.abs().max()))
    decided = schedule(cache, LAYOUTS[name], Trajectory(table.timesteps))
    cond = skeletons.computed(decided, names(name), "" if cache.is_guidance_distilled else "cond")
    assert cond == [r & set(names(name)) for r in theirs.ran]
    assert 0 < sum(len(c) < len(names(name)) for c in cond) < steps
    if cache.is_guidance_distilled:
        assert len(planned.variants) == 2
    else:
        assert batches == [1 if "low" in d.actions else 2 for d in decided.decisions]
        assert len(planned.variants) == 3


def test_the_comparison_can_fail():
    name, cache, scheduler, steps = RUNS["cogvideox, other weights"]
    component, table, latents, _ = setting(name, scheduler, steps)
    planned = make_plans(cache, LAYOUTS[name], {steps: table})
    ours = peers.ours(component, planned, planned.plans[0], latents)
    for other in ({"low_frequency_weight": 1.0}, {"attention_weight": 0.9}, {"unconditional_batch_skip_range": 4}):
        theirs = peers.peer_replay(component, table, latents, peer_of(cache.model_copy(update=other)))
        assert ours.error(theirs) > 5 * CLOSE


def test_an_uncached_plan_is_the_plain_model():
    component, table, latents, _ = setting("cogvideox", DDIM, 6)
    planned = make_plans(FasterCache(), LAYOUTS["cogvideox"], {6: table})
    ours = peers.ours(component, planned, planned.plans[1], latents)
    assert ours.error(peers.peer_replay(component, table, latents, lambda model, clock: None)) < CLOSE


def test_nothing_of_the_unconditional_branch_is_left_where_it_is_skipped():
    component = denoisers.with_guidance(denoisers.cogvideox(layers=1), planes=True)
    planned = make_plans(FasterCache(), layout_of(component), {12: peers.table_of(DDIM, 12)})
    with open_progress("quiet") as quiet:
        planned, graphs = capture_variants(component, planned, quiet)
    assert [count_attention_ops(g) for g in graphs] == [2, 1, 0]  # both branches, the conditional one, none
    costs = {g.name: count_cost(g) for g in graphs}
    check_variant_costs(component, planned, costs)  # what an export holds against its variants
    inside = module_flops(component.module, component.args)
    assert costs["reuse"].flops == inside["cond"] == inside["uncond"]
    assert costs["reuse-2"].flops < costs["reuse"].flops


@pytest.mark.slow
@pytest.mark.compiles
def test_the_artifact_is_the_replay():
    component = denoisers.with_guidance(denoisers.pixart(layers=1), planes=True)
    cache, table = FasterCache(unconditional_batch_timestep_skip_range=(-1, 900)), peers.table_of(DDIM, 6)
    latents = denoisers.noise(*component.args[0].shape)
    planned = make_plans(cache, layout_of(component), {6: table})
    assert [v.name for v in planned.variants] == ["full", "reuse", "reuse-2"]
    eager = peers.ours(component, planned, planned.plans[0], latents)
    artifact = compiled_run("pixart, one block, planes", component, planned, planned.plans[0], latents)
    assert artifact.error(eager) < 2e-5  # the compiler adds in another order


def test_a_first_step_inside_the_window_computes_here_and_fails_in_diffusers():
    """On purpose: a distilled model that starts inside the window (image to image) has nothing to continue yet."""
    cache = FasterCache(is_guidance_distilled=True, spatial_attention_timestep_skip_range=(-1, 1001))
    component, table, latents, scale = setting("flux", FLOW, 6)
    with pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        peers.peer_replay(component, table, latents, peer_of(cache), timestep_scale=scale)
    planned = make_plans(cache, LAYOUTS["flux"], {6: table})
    assert [e.variant for e in planned.plans[0].evaluations] == ["full", "reuse"] * 3
    ours = peers.ours(component, planned, planned.plans[0], latents, timestep_scale=scale)
    assert all(output.isfinite().all() for output in ours.outputs)


def test_inputs_that_diffusers_does_not_halve_are_halved_here():
    """On purpose: by its own list diffusers leaves SD3's pooled text whole, the skipped branch comes back by
    broadcasting, and the shapes do not fit any more. Branches are apart in our graph, so no list is needed."""
    cache = FasterCache(tensor_format="BCHW")
    component, table, latents, _ = setting("sd3", FLOW, 14)
    own = FasterCacheConfig()._unconditional_conditional_input_kwargs_identifiers
    listed = peer_of(cache, _unconditional_conditional_input_kwargs_identifiers=own)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match the size of tensor b \(2\)"):
        peers.peer_replay(component, table, latents, listed)
    planned = make_plans(cache, LAYOUTS["sd3"], {14: table})
    ours = peers.ours(component, planned, planned.plans[0], latents)
    assert ours.error(peers.peer_replay(component, table, latents, peer_of(cache))) < CLOSE


def test_a_tensor_format_changes_no_number():
    """In diffusers it says which dimensions are folded into the batch before the last two are transformed."""
    name, cache, scheduler, _ = RUNS["cogvideox, other weights"]
    component, table, latents, _ = setting(name, scheduler, 6)
    cache = cache.model_copy(update={"high_frequency_weight": 1.2})
    other = cache.model_copy(update={"tensor_format": "BCFHW"})
    run, same = (peers.peer_replay(component, table, latents, peer_of(c)) for c in (cache, other))
    assert same.error(run) < CLOSE
    assert schedule(cache, LAYOUTS[name], Trajectory(table.timesteps)) == schedule(
        other, LAYOUTS[name], Trajectory(table.timesteps)
    )


def test_temporal_attention_has_its_own_range_and_is_chosen_among_diffusers_names():
    places = tuple(
        Place(n, "", n, "attention", ("hidden_states",))
        for n in ("transformer_blocks.0.attn1", "temporal_transformer_blocks.0.attn1", "context_refiner.attn")
    )
    cache = FasterCache(
        is_guidance_distilled=True, temporal_attention_block_skip_range=3, spatial_attention_block_identifiers=("^tran", "refiner"),
        spatial_attention_timestep_skip_range=(-1, 1001), temporal_attention_timestep_skip_range=(-1, 850),
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"identifiers \['refiner'\] match no attention"):
        schedule(cache, Layout(places), Trajectory((900.0,)))
    narrowed = cache.model_copy(update={"spatial_attention_block_identifiers": ("^tran",)})
    got = schedule(narrowed, Layout(places), Trajectory((900.0, 880.0, 700.0, 600.0, 500.0)))
    assert [sorted(n.partition("_")[0] for n in d.actions) for d in got.decisions] == [
        [], ["transformer"], ["temporal"], ["transformer"], ["temporal"],
    ]  # fmt: skip


def test_what_a_denoiser_lacks_is_said():
    trajectory = Trajectory((900.0, 500.0, 100.0))
    with pytest.raises(ExportError, match=r"has one branch only.*is_guidance_distilled=true"):
        schedule(FasterCache(), LAYOUTS["flux"], trajectory)
    plain = layout_of(denoisers.with_guidance(denoisers.pixart()))
    with pytest.raises(ExportError, match=r"must build it with guided\(\.\.\., planes=\(H, W\)\)"):
        schedule(FasterCache(), plain, trajectory)
    with pytest.raises(RecipeError, match=r"attention_weight has 2 weights, .*evaluated 3 times"):
        schedule(FasterCache(attention_weight=(0.1, 0.2)), LAYOUTS["pixart"], trajectory)
    with pytest.raises(ExportError, match=r"\['nowhere'\] match .*; it has transformer_blocks\.0\.a"):
        schedule(FasterCache(spatial_attention_block_identifiers=("nowhere",)), LAYOUTS["pixart"], trajectory)
    assert FasterCache().needs_planes
    assert not FasterCache(is_guidance_distilled=True).needs_planes


def test_both_branches_at_once_are_refused_by_the_key_that_says_so():
    with pytest.raises(RecipeError, match=r"guidance.branches.*set guidance\.branches = \"sequential\""):
        resolve("pixart-fast", ("cache.method=fastercache", "guidance.branches=batched"))
    resolve(
        "pixart-fast", ("cache.method=fastercache", "guidance.branches=batched", "cache.is_guidance_distilled=true")
    )


def test_packed_tokens_are_no_picture():
    """FLUX with true guidance: [1, N, C] would be filtered across tokens and channels."""
    guided = denoisers.with_guidance(denoisers.flux())
    with pytest.raises(ExportError, match=r"is packed tokens \[1, .*set cache\.is_guidance_distilled=true"):
        add_planes(guided)
    assert add_planes(denoisers.with_guidance(denoisers.pixart())).module.low


def setting(name: str, scheduler: Any, steps: int):
    component = MADE[name]
    scale = 1e-3 if name == "flux" else 1.0
    return component, peers.table_of(scheduler, steps), denoisers.noise(*component.args[0].shape), scale
