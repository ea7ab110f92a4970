"""TaylorSeer against diffusers' own hooks: which modules run, what is predicted for the others, and what comes out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_taylorseer_cache
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from hypothesis import given, settings
from hypothesis import strategies as st

from prebake.exporter.caches import TaylorSeer, Trajectory, schedule
from prebake.exporter.plan import make_plans
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime.errors import ExportError, RecipeError
from support import cache_peers as peers
from support import skeleton_models as skeletons
from support import tiny_denoisers as denoisers
from support.known_layouts import LayoutTable, layout_of
from support.variant_compiler import compiled_run

# float32 through up to 14 evaluations, sums in another order: up to 1.3e-6 was seen; a wrong step or coefficient is off by
# 5e-5 at the least
CLOSE = 5e-6
MADE = {
    "flux": denoisers.flux(),
    "cogvideox": denoisers.with_guidance(denoisers.cogvideox()),
    "sd3": denoisers.with_guidance(denoisers.sd3()),
    "pixart": denoisers.with_guidance(denoisers.pixart()),
}
LAYOUTS = LayoutTable(MADE)
KEYS = [k for k in TaylorSeer.model_fields if k not in ("method", "taylor_factors_dtype")]


def peer_of(cache: TaylorSeer):
    """Puts diffusers' hooks on with the same parameters."""

    def apply(model, clock):
        dtype = getattr(torch, cache.taylor_factors_dtype)
        given = {k: getattr(cache, k) for k in KEYS}
        apply_taylorseer_cache(model, TaylorSeerCacheConfig(**given, taylor_factors_dtype=dtype))
        skeletons.in_context(model)

    return apply


IDENTIFIERS: list[dict[str, Any]] = [
    {"cache_identifiers": (r".*attn\d?",)},
    {"cache_identifiers": (r"transformer_blocks\.0",), "skip_predict_identifiers": (r".*blocks\.1.*\.(ff|proj_mlp)",)},
    {"cache_identifiers": (r".*blocks\.0", "proj_out"), "skip_predict_identifiers": (r".*blocks\.1\.attn\d?",)},
    {"use_lite_mode": True},
    {"use_lite_mode": True, "cache_identifiers": ("overridden",)},
]
POLICIES = st.fixed_dictionaries(
    {
        "cache_interval": st.integers(1, 8),
        "disable_cache_before_step": st.integers(1, 8),
        "disable_cache_after_step": st.none() | st.integers(0, 50),
        "max_order": st.integers(0, 3),
    }
)


def fits(name: str, identifiers: dict[str, Any]) -> bool:
    return name == "flux" or "proj_mlp" not in str(identifiers)


@settings(deadline=None, max_examples=150)
@given(
    POLICIES, st.sampled_from(IDENTIFIERS), st.sampled_from(sorted(MADE)), st.sampled_from(sorted(skeletons.SCHEDULERS)),
    st.integers(1, 40),
)  # fmt: skip
def test_the_modules_that_compute_are_those_that_diffusers_runs(policy, identifiers, name, scheduler, steps):
    if not fits(name, identifiers):
        return
    cache = TaylorSeer(**policy, **identifiers)
    timesteps = skeletons.SCHEDULERS[scheduler](steps)
    every = LAYOUTS[name].places + LAYOUTS[name].others
    names = tuple(dict.fromkeys(p.name for p in every))
    ours = schedule(cache, LAYOUTS[name], Trajectory(timesteps))
    theirs = skeletons.ran(skeletons.model_of(MADE[name]), names, timesteps, peer_of(cache))
    for branch in LAYOUTS[name].branches:
        assert skeletons.computed(ours, names, branch) == theirs


@settings(deadline=None, max_examples=150)
@given(POLICIES, st.integers(2, 40), st.integers(0, 1000))
def test_coefficients_predict_what_diffusers_state_predicts(policy, steps, seed):
    """In float64, on outputs that are random numbers: every order, gap, warm-up and cooldown."""
    cache = TaylorSeer(**policy)
    ours = schedule(cache, LAYOUTS["flux"], Trajectory((0.0,) * steps))
    site = "transformer_blocks.0.attn"
    outputs = torch.randn(steps, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state = TaylorSeerState(torch.float64, cache.max_order)
    computed: list[torch.Tensor] = []
    for step, decision in enumerate(ours.decisions):
        state.current_step = step
        if not decision.actions:
            state.update((outputs[step],))
            computed.insert(0, outputs[step])
            continue
        weights = decision.coefficients[site]
        assert len(weights) == cache.max_order + 1
        assert not any(weights[len(computed) :])  # nothing is read that was not stored
        mine = sum(w * y for w, y in zip(weights, computed, strict=False))
        (theirs,) = state.predict()
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9 * sum(map(abs, weights)))


def test_28_steps_compute_as_the_defaults_say():
    ours = schedule(TaylorSeer(), LAYOUTS["flux"], Trajectory((0.0,) * 28))
    assert "".join("10"[bool(d.actions)] for d in ours.decisions) == "1110100001000010000100001000"


def test_a_polynomial_over_even_steps_is_predicted_as_far_as_backward_differences_are_its_derivatives():
    """A constant by order 0 and a line by order 1 exactly. A parabola is not: f_1 is the slope half a step ago, and d^2/2
    does not make up for it: d steps after a computed one, the rest is d times the steps between computed ones."""
    for order, gap in ((1, 1), (2, 4), (3, 3)):
        cache = TaylorSeer(cache_interval=gap + 1, disable_cache_before_step=1, max_order=order)
        ours = schedule(cache, LAYOUTS["flux"], Trajectory((0.0,) * 40))
        computed: list[int] = []
        for step, d in enumerate(ours.decisions):
            if not d.actions:
                computed.insert(0, step)
            elif len(computed) > 4:  # the last four at equal distances: step 0 is no more among them
                terms = list(zip(d.coefficients["transformer_blocks.0.attn"], computed, strict=False))
                assert sum(w for w, _ in terms) == pytest.approx(1.0)
                assert sum(w * (3.0 * s + 2) for w, s in terms) == pytest.approx(3.0 * step + 2)
                if order > 1:
                    rest = (step - computed[0]) * (computed[0] - computed[1])
                    assert sum(w * s * s for w, s in terms) == pytest.approx(step**2 - rest)


FLOAT32 = {"taylor_factors_dtype": "float32"}
FLOW, DDIM = FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler(clip_sample=False)
RUNS: dict[str, tuple[str, TaylorSeer, Any, int]] = {
    "flux, defaults": ("flux", TaylorSeer(**FLOAT32), FLOW, 12),
    "flux, order 3, cooldown": (
        "flux",
        TaylorSeer(max_order=3, cache_interval=3, disable_cache_before_step=2, disable_cache_after_step=11, **FLOAT32),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        14,
    ),
    "flux, whole double blocks, zero feed-forwards": (
        "flux",
        TaylorSeer(
            cache_identifiers=(r"transformer_blocks\.\d+",),
            skip_predict_identifiers=(r"single_transformer_blocks\.1\.proj_mlp|single_transformer_blocks\.0\.attn",),
            cache_interval=2, **FLOAT32,
        ),
        FlowMatchHeunDiscreteScheduler(),
        5,
    ),
    "flux, lite": ("flux", TaylorSeer(use_lite_mode=True, max_order=2, **FLOAT32), FLOW, 12),
    "cogvideox": ("cogvideox", TaylorSeer(cache_identifiers=(".*attn1", ".*ff"), cache_interval=4, **FLOAT32), DDIM, 10),
    "sd3, order 0": ("sd3", TaylorSeer(max_order=0, **FLOAT32), FLOW, 10),
    "pixart, order 2": (
        "pixart", TaylorSeer(max_order=2, cache_identifiers=(".*attn[12]",), disable_cache_before_step=4, **FLOAT32), DDIM, 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_replay_is_diffusers_run(case):
    name, cache, scheduler, steps = RUNS[case]
    ours, theirs, decided = both(name, cache, scheduler, steps)
    assert ours.error(theirs) < CLOSE
    assert torch.allclose(ours.latents, theirs.latents, rtol=0, atol=CLOSE * float(theirs.latents.abs().max()))
    marked = {m.name.rpartition("/")[2] for m in decided.marks} & {p.name for p in LAYOUTS[name].places}
    for branch in LAYOUTS[name].branches:
        computing = skeletons.computed(decided, tuple(marked), branch)
        assert computing == [r & marked for r in theirs.ran]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_factors_stored_in_bfloat16_differ_by_its_rounding_only(order):
    """diffusers rounds f_0, f_1, ..., we the outputs that they are differences of; 2^-9 of each. At order 0 both round the
    same, and still the last bit of a float32 sum may turn a rounding on another model. A prediction multiplies what was
    rounded by at most |coefficients| on either side."""
    cache = TaylorSeer(max_order=order, cache_interval=3)
    ours, theirs, decided = both("flux", cache, FLOW, 10)
    largest = max(sum(map(abs, c)) for d in decided.decisions for c in d.coefficients.values())
    error = ours.error(theirs)
    assert error < 2 * largest * 2**-9
    assert order == 0 or error > CLOSE
    exact, _, _ = both("flux", cache.model_copy(update=FLOAT32), FLOW, 10)
    assert ours.error(exact) < 2 * largest * 2**-9
    assert theirs.error(exact) < 2 * largest * 2**-9


def test_the_comparison_can_fail():
    cache = RUNS["flux, defaults"][1]
    ours, _, _ = both("flux", cache, FLOW, 12)
    _, theirs, _ = both("flux", cache.model_copy(update={"max_order": 0}), FLOW, 12)
    assert ours.error(theirs) > 10 * CLOSE


def test_an_uncached_plan_is_the_plain_model():
    table, latents = peers.table_of(DDIM, 5), denoisers.noise(*MADE["sd3"].args[0].shape)
    planned = make_plans(TaylorSeer(), LAYOUTS["sd3"], {5: table})
    ours = peers.ours(MADE["sd3"], planned, planned.plans[1], latents)
    assert ours.error(peers.peer_replay(MADE["sd3"], table, latents, lambda model, clock: None)) < CLOSE


@pytest.mark.slow
@pytest.mark.compiles
def test_the_artifact_is_the_replay():
    cache, table = TaylorSeer(disable_cache_before_step=2), peers.table_of(FLOW, 6)
    component = denoisers.flux(single=1)
    latents = denoisers.noise(*component.args[0].shape)
    planned = make_plans(cache, layout_of(component), {6: table})
    eager = peers.ours(component, planned, planned.plans[0], latents, timestep_scale=1e-3)
    artifact = compiled_run("flux, one single", component, planned, planned.plans[0], latents, timestep_scale=1e-3)
    # stored values are bfloat16: where the compiler's last float32 bit turns a rounding, 2^-8 of one value follows
    assert artifact.error(eager) < 1e-3
    uncached = peers.ours(component, planned, planned.plans[1], latents, timestep_scale=1e-3)
    assert uncached.error(eager) > 3e-3


def test_default_identifiers_that_match_no_whole_name_are_refused_where_diffusers_hooks_nothing():
    """On purpose: `^transformer_blocks.*attn` is no full match of `transformer_blocks.0.attn1`, and diffusers then runs
    everything in every step without a word."""
    table, latents = peers.table_of(DDIM, 8), denoisers.noise(*MADE["pixart"].args[0].shape)
    theirs = peers.peer_replay(MADE["pixart"], table, latents, peer_of(TaylorSeer()))
    plain = peers.peer_replay(MADE["pixart"], table, latents, lambda model, clock: None)
    assert theirs.error(plain) == 0
    with pytest.raises(ExportError, match=r"match no whole module name; .*blocks\.0\.attn1, t"):
        schedule(TaylorSeer(), LAYOUTS["pixart"], Trajectory(table.timesteps))


def test_lite_mode_on_a_block_that_returns_no_text_runs_here_and_fails_in_diffusers():
    """On purpose: SD3's last block returns (None, image), of which diffusers asks the dtype."""
    cache = TaylorSeer(use_lite_mode=True, **FLOAT32)
    table, latents = peers.table_of(FLOW, 8), denoisers.noise(*MADE["sd3"].args[0].shape)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'dtype'"):
        peers.peer_replay(MADE["sd3"], table, latents, peer_of(cache))
    planned = make_plans(cache, LAYOUTS["sd3"], {8: table})
    # the blocks' zeros reach nothing, for the projection after them is predicted: predicting it alone is the same
    alone = cache.model_copy(update={"use_lite_mode": False, "cache_identifiers": ("proj_out",)})
    ours = peers.ours(MADE["sd3"], planned, planned.plans[0], latents)
    theirs = peers.peer_replay(MADE["sd3"], table, latents, peer_of(alone))
    assert ours.error(theirs) < CLOSE


def test_a_first_step_without_computing_is_refused_where_diffusers_raises():
    config = SimpleNamespace(**{k: v for k, v in TaylorSeer().model_dump().items() if k != "method"})
    config.disable_cache_before_step, config.taylor_factors_dtype = 0, torch.float32
    with pytest.raises(ValueError, match="Cannot predict without prior initialization/update"):
        skeletons.ran(
            skeletons.model_of(MADE["flux"]), ("transformer_blocks.0.attn",), (900.0,),
            lambda model, clock: (apply_taylorseer_cache(model, config), skeletons.in_context(model))[1],
        )  # fmt: skip
    with pytest.raises(RecipeError, match=r"disable_cache_before_step = 0 .* from nothing; set it to"):
        resolve("flux-fast", ["cache.method=taylorseer", "cache.disable_cache_before_step=0"])


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"cache_identifiers": (".*attn", "attn1")}, r"cache\.cache_identifiers 'attn1' matches no whole module name; the m"),
        ({"skip_predict_identifiers": ("ff",)}, r"cache\.skip_predict_identifiers 'ff' matches no whole module name"),
        (
            {"cache_identifiers": (r"transformer_blocks\.0", ".*attn")},
            r"select transformer_blocks\.0\.attn inside transformer_blocks\.0, which would be predicted twice",
        ),
    ],
)  # fmt: skip
def test_identifiers_that_select_nothing_or_too_much_are_refused(chosen, sentence):
    with pytest.raises(ExportError, match=sentence):
        schedule(TaylorSeer(**chosen), LAYOUTS["flux"], Trajectory((900.0, 500.0)))


def both(name: str, cache: TaylorSeer, scheduler: Any, steps: int):
    """Our replay, diffusers' run, and what was decided."""
    component, scale = MADE[name], 1e-3 if name == "flux" else 1.0
    kwargs = {"mu": 1.15} if scheduler.config.get("use_dynamic_shifting") else {}
    table = peers.table_of(scheduler, steps, **kwargs)
    latents = denoisers.noise(*component.args[0].shape)
    planned = make_plans(cache, LAYOUTS[name], {steps: table})
    ours = peers.ours(component, planned, planned.plans[0], latents, timestep_scale=scale)
    theirs = peers.peer_replay(component, table, latents, peer_of(cache), timestep_scale=scale)
    return ours, theirs, schedule(cache, LAYOUTS[name], Trajectory(table.timesteps))


def test_order_0_is_reuse():
    decided = schedule(TaylorSeer(max_order=0), LAYOUTS["flux"], Trajectory((0.0,) * 28))
    assert {c for d in decided.decisions for c in d.coefficients.values()} == {(1.0,)}
    assert math.isclose(sum(not d.actions for d in decided.decisions), 8)
