"""The mask: what it says, what it computes, and its prediction, against the same written a second time in eager."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, PNDMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prebake.exporter.caches import Mask, NoCache, Trajectory, schedule
from prebake.exporter.caches.common.predict import lagrange_weights
from prebake.exporter.caches.common.steps_mask import MASK_NAMES, steps_mask
from prebake.exporter.plan import make_plans
from prebake.runtime.errors import ExportError, RecipeError
from support import block_cache_patches as blocks
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.variant_compiler import compiled_run

SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(),
}
MADE = {}


def denoiser(name: str):
    """A denoiser and its layout: "sd3" with one branch, "sd3-cfg" with guidance."""
    if name not in MADE:
        component = (denoisers.DITS | denoisers.UNETS)[name.removesuffix("-cfg")]()
        component = denoisers.with_guidance(component) if name.endswith("-cfg") else component
        MADE[name] = component, layout_of(component)
    return MADE[name]


def start(component, seed: int = 0) -> torch.Tensor:
    return torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(seed))


# what a mask may be


def bits(mask: Mask, steps: int) -> str:
    return "".join("01"[b] for b in mask.expand(steps))


def test_a_list_is_the_text_that_it_spells():
    for written in ([1, 1, 0], [True, True, False], (1, True, 0), "[1, 1, 0]", "[true, true, false]"):
        assert Mask(mask=written) == Mask(mask="110")


@pytest.mark.parametrize("written", [[1, 2], [1, 0.0], ["1", "0"], "[1, 0", "[]", "slowly", "", "1(0", 3])
def test_what_is_no_mask_is_refused(written):
    with pytest.raises(ValidationError, match=r"expected|valid string"):
        Mask(mask=written)


@pytest.mark.parametrize("name", MASK_NAMES)
def test_a_named_mask_is_cache_dits_at_every_number_of_steps(name):
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed: its masks are the reference")
    for steps in (4, 6, *range(8, 130), 1000):
        theirs = cache_dit.steps_mask(total_steps=steps, mask_policy=name)
        assert steps_mask(name, steps) == "".join(map(str, theirs)), steps
    for steps in (1, 2, 3, 5, 7):
        with pytest.raises(AssertionError, match="Only total_steps=4 or 6"):
            cache_dit.steps_mask(total_steps=steps, mask_policy=name)
        with pytest.raises(RecipeError, match=rf"mask '{name}' is defined for .*not for {steps}"):
            Mask(mask=name).expand(steps)


def test_a_named_mask_that_starts_too_soon_for_its_order_is_refused_at_those_steps():
    assert bits(Mask(mask="ultra", order=1), 16) == "1100000000000001"
    with pytest.raises(RecipeError, match=r"mask 'ultra' skips one of the first .* \(at 16 steps\)"):
        Mask(mask="ultra", order=2).expand(16)


@pytest.mark.parametrize(
    ("order", "mask", "sentence"),
    [
        (0, "011", "skips the first step, when there is nothing to reuse; start it with 1"),
        (1, "10(1)", "skips one of the first two steps, which order = 1 predicts from; start it with 11 or set order = 0"),
        (2, "110(1)", "skips one of the first three steps, which order = 2 predicts from; start it with 111 or set order = 0"),
        (2, "(10)", "skips one of the first three steps"),
    ],
)  # fmt: skip
def test_a_prediction_from_too_few_values_is_refused(order, mask, sentence):
    with pytest.raises(ValidationError) as e:
        Mask(mask=mask, order=order)
    assert f"mask '{mask}' {sentence}" in str(e.value)


def test_a_mask_of_the_output_selects_no_blocks():
    with pytest.raises(ValidationError, match=r"blocks = '1:' .* site = \"output\" skips them all"):
        Mask(mask="1(01)", site="output", blocks="1:")


# what the coefficients are

TIMES = st.lists(st.fractions(0, 1000, max_denominator=997), min_size=4, max_size=4, unique=True)


@settings(suppress_health_check=[HealthCheck.too_slow])  # says that the machine is busy, and nothing of the code
@given(TIMES, st.lists(st.fractions(-9, 9, max_denominator=99), min_size=1, max_size=3))
def test_as_many_nodes_as_coefficients_continue_a_polynomial_exactly(times, coefficients):
    def value(t: Fraction) -> Fraction:
        return sum((c * t**k for k, c in enumerate(coefficients)), Fraction(0))

    t, *nodes = times
    nodes = nodes[: len(coefficients)]
    weights = lagrange_weights(t, nodes)
    assert sum(weights) == 1
    assert sum(w * value(n) for w, n in zip(weights, nodes, strict=True)) == value(t)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=9, max_size=9, unique=True),
    st.sampled_from((0, 1, 2)),
    st.lists(st.floats(-2, 2), min_size=3, max_size=3),
)
def test_a_schedule_predicts_polynomials_of_its_order_exactly(timesteps, order, coefficients):
    timesteps = sorted((float(t) for t in timesteps), reverse=True)
    value = {t: sum(c * (t / 1000) ** k for k, c in enumerate(coefficients[: order + 1])) for t in timesteps}
    _, layout = denoiser("flux")
    got = schedule(Mask(mask="111(01)", order=order), layout, Trajectory(tuple(timesteps)))
    stored: list[float] = []
    for decision, t in zip(got.decisions, timesteps, strict=True):
        for weights in decision.coefficients.values():
            predicted = sum(w * y for w, y in zip(weights, stored, strict=False))
            # timesteps 1 apart can predict one 999 away: the weights, up to 1e6, magnify the values' last bits
            assert predicted == pytest.approx(value[t], abs=1e-8)
        if not decision.coefficients:
            stored.insert(0, value[t])


def test_a_mask_computes_where_it_says_1_and_draws_a_line_elsewhere():
    timesteps = (1000.0, 900.0, 750.0, 500.0, 200.0)
    got = schedule(Mask(mask="11010", order=1), denoiser("flux")[1], Trajectory(timesteps))
    (mark,) = got.marks
    assert mark.name == "blocks[0:3]"
    assert [mark.name in d.actions for d in got.decisions] == [False, False, True, False, True]
    # at 750 from 900 and 1000: 150 further on where the last two are 100 apart
    assert got.decisions[2].coefficients[mark.name] == (2.5, -1.5)
    assert got.decisions[4].coefficients[mark.name] == (1.75, -0.75)


def test_a_step_with_two_evaluations_computes_or_skips_both():
    _, layout = denoiser("flux")
    table = peers.table_of(SCHEDULERS["heun"](), 5)
    got = schedule(Mask(mask="11010"), layout, Trajectory(table.timesteps, table.sigmas, table.steps))
    assert table.steps == (0, 0, 1, 1, 2, 2, 3, 3, 4)
    assert [len(d.actions) for d in got.decisions] == [0, 0, 0, 0, 1, 1, 0, 0, 1]


def test_a_curve_through_two_values_at_one_timestep_is_refused():
    _, layout = denoiser("flux")
    table = peers.table_of(PNDMScheduler(skip_prk_steps=True), 5)
    trajectory = Trajectory(table.timesteps, table.sigmas, table.steps)
    with pytest.raises(ExportError, match=r"the last 3 computed .*timesteps .*; take a lower order"):
        schedule(Mask(mask="111(0)", order=2), layout, trajectory)
    assert schedule(Mask(mask="111(0)", order=0), layout, trajectory)


# which sites there are


def test_branches_of_guidance_have_a_site_each_and_the_output_has_one():
    _, layout = denoiser("sd3-cfg")
    trajectory = Trajectory((900.0, 600.0, 300.0))
    in_blocks = schedule(Mask(mask="110", blocks="1:"), layout, trajectory)
    assert [m.name for m in in_blocks.marks] == ["uncond/blocks[1:2]", "cond/blocks[1:2]"]
    at_output = schedule(Mask(mask="110", site="output", order=1), layout, trajectory)
    assert [(m.name, m.slots) for m in at_output.marks] == [("output", 2)]


def test_an_empty_block_range_is_refused():
    with pytest.raises(ExportError, match=r"cache\.blocks '5:' selects none of the model's 3 blocks"):
        schedule(Mask(mask="1(01)", blocks="5:"), denoiser("flux")[1], Trajectory((900.0, 600.0)))


def test_a_unet_has_no_stack_of_blocks():
    for given_blocks in (":", "1:"):
        with pytest.raises(ExportError, match=r"cache\.site \"blocks\".*set cache\.site = \"output\""):
            schedule(Mask(mask="1(01)", blocks=given_blocks), denoiser("sd")[1], Trajectory((900.0, 600.0)))


# against the same written in another way


def sides(name: str, cache: Mask, table):
    """Our replay, and the run of an eager model whose own blocks (or whole forward) are patched."""
    component, layout = denoiser(name)
    steps = len(set(table.steps))
    planned = make_plans(cache, layout, {steps: table})
    ours = peers.ours(component, planned, planned.plans[0], start(component))
    expanded = cache.expand(steps)
    computes = [expanded[s] for s in table.steps]

    def apply(model, clock):
        if cache.site == "output":
            return output_skipped(model, clock, computes, cache.order)
        lo, hi = (int(b) if b else None for b in cache.blocks.split(":"))
        emulated = blocks.Skipped(blocks.STREAMS[name.removesuffix("-cfg")], computes, cache.order)
        return emulated(blocks.stack(model)[lo:hi], clock)

    return ours, peers.peer_replay(component, table, start(component), apply)


def output_skipped(model, clock, computes, order) -> None:
    times, values = [], []

    def forward(inner, *args, **kwargs):
        if computes[clock.e]:
            output = inner(*args, **kwargs)
            times.append(clock())
            values.append(output[0])
            return output
        return (blocks.newton(times[-1 - order :], values[-1 - order :], clock()),)

    blocks.patch(model, forward)


def check(name: str, cache: Mask, table) -> None:
    ours, peer = sides(name, cache, table)
    _, layout = denoiser(name)
    got = schedule(cache, layout, Trajectory(table.timesteps, table.sigmas, table.steps))
    for branch in layout.branches:
        if cache.site == "blocks":
            assert blocks.blocks_run(layout, got, branch) == blocks.blocks_ran(layout, peer)
        else:
            assert [bool(run) for run in peer.ran] == [not d.actions for d in got.decisions]
    # float32 sums in another order, which an order of 2 multiplies by 7 in each prediction: 1.05e-5 is the most that was seen, on a
    # CPU with AVX2; a wrong coefficient or site is off by 1e-2, as the canary shows
    assert ours.error(peer) < 2e-5
    assert float((ours.latents - peer.latents).abs().max() / peer.latents.abs().max()) < 2e-5


MASKS = st.tuples(st.sampled_from((0, 1, 2)), st.text("01", min_size=1, max_size=3), st.text("01", max_size=3))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(("flux", "sd3-cfg", "cogvideox-cfg")),
    st.sampled_from(tuple(SCHEDULERS)),
    MASKS,
    st.integers(1, 6),
    st.sampled_from((":", "1:", ":-1")),
)
def test_the_blocks_and_the_trajectory_are_those_of_an_eager_model_that_skips(name, scheduler, mask, more, chosen):
    order, group, tail = mask
    if scheduler == "heun" and order == 2:  # evaluates one timestep twice
        order = 1
    cache = Mask(mask=f"111(0{group}){tail}", order=order, blocks=chosen)
    check(name, cache, peers.table_of(SCHEDULERS[scheduler](), 4 + len(tail) + more))


@pytest.mark.parametrize("name", ["flux", "pixart-cfg", "sd3-cfg", "sd-cfg", "sdxl-cfg"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_output_that_is_predicted_runs_nothing(name, order):
    check(name, Mask(mask="111(001)", site="output", order=order), peers.table_of(SCHEDULERS["ddim"](), 9))


def test_the_comparison_can_fail():
    component, layout = denoiser("flux")
    table = peers.table_of(SCHEDULERS["shifted"](), 8)
    _, peer = sides("flux", Mask(mask="111(01)", order=1), table)
    for other in (
        Mask(mask="111(01)", order=2),
        Mask(mask="111(01)", order=1, blocks="1:"),
        Mask(mask="1110(1)", order=1),
    ):
        planned = make_plans(other, layout, {8: table})
        assert peers.ours(component, planned, planned.plans[0], start(component)).error(peer) > 1e-3


@pytest.mark.parametrize("name", ["flux", "sd3-cfg", "sd"])
def test_a_mask_of_ones_is_the_plain_model(name):
    component, layout = denoiser(name)
    table = peers.table_of(SCHEDULERS["ddim"](), 5)
    cache = Mask(mask="1(01)", site="output") if name == "sd" else Mask(mask="1(01)")
    planned = make_plans(cache, layout, {5: table})
    assert {e.variant for e in planned.plans[1].evaluations} == {"full"}
    plain = make_plans(NoCache(), layout, {5: table})
    uncached = peers.ours(component, planned, planned.plans[1], start(component))
    assert uncached.error(peers.ours(component, plain, plain.plans[0], start(component))) == 0.0


@pytest.mark.slow
@pytest.mark.compiles
def test_a_compiled_output_is_the_eager_one():
    component, layout = denoiser("flux")
    table = peers.table_of(SCHEDULERS["ddim"](), 7)
    planned = make_plans(Mask(mask="111(01)", order=2, site="output"), layout, {7: table})
    eager = peers.ours(component, planned, planned.plans[0], start(component))
    artifact = compiled_run("flux", component, planned, planned.plans[0], start(component))
    # the compiler adds in another order; a wrong coefficient is off by 1e-2
    assert artifact.error(eager) < 2e-5
