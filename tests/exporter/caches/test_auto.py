"""The search: what it fits, what its plans replay to, and what a budget chooses."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from pydantic import ValidationError

from prebake.exporter.caches import Auto, NoCache
from prebake.exporter.caches.auto import Floor, choose_plan
from prebake.exporter.caches.common.calibration import Calibration, FittedPlan, find_calibration, read_calibration
from prebake.exporter.calibrators.runner import split_runs
from prebake.exporter.calibrators.search import RIDGE, SearchWalk, least_squares, search_plans, stack_runs
from prebake.exporter.plan import make_plans
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import recipe_names, resolve
from prebake.runtime.errors import ExportError, RecipeError
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.variant_compiler import compiled_run

STEPS = 8
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm": lambda: DPMSolverMultistepScheduler(),
    "ancestral": lambda: EulerAncestralDiscreteScheduler(),
}


def table_of(name: str, steps: int = STEPS):
    return peers.table_of(SCHEDULERS[name](), steps)


def run_of(component, table, seed: int) -> SimpleNamespace:
    """One trajectory with a prompt of its own."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        n: t if n.startswith("guidance") or n == "time_ids" else torch.randn(t.shape, generator=generator)
        for n, t in peers.inputs_of(component).items()
    }
    latents = torch.randn(component.args[0].shape, generator=generator) * table.init_noise_sigma
    noise = tuple(torch.randn(latents.shape, generator=generator) for u in table.updates if u.noise)
    return SimpleNamespace(label="", inputs=inputs, latents=latents, noise=noise)


def picture(latents: torch.Tensor) -> torch.Tensor:
    """Something in 0..1 of the shape of a picture, for a model that has no decoder."""
    return torch.sigmoid(latents.reshape(len(latents), 1, 8, -1))


def component_of(name: str):
    return denoisers.flux() if name == "flux" else denoisers.with_guidance(denoisers.DITS[name]())


@cache
def found(name: str, scheduler: str, candidates: tuple[str, ...]) -> tuple[FittedPlan, ...]:
    component, table = component_of(name), table_of(scheduler)
    subject = SimpleNamespace(denoiser=component, layout=layout_of(component), table=table, timestep_scale=1.0)
    runs = [run_of(component, table, seed) for seed in range(6)]
    with open_progress("quiet") as quiet:
        settings = Auto(candidates=candidates, beam=2, search_budget=0.8)
        return search_plans(subject, settings, runs[:3], runs[3:], picture, lambda n: table_of(scheduler, n), quiet)


def calibration_of(table, plans: tuple[FittedPlan, ...]) -> Calibration:
    return Calibration(
        model="", sha256="", scheduler=table.scheduler, steps=STEPS, timesteps=table.timesteps, guidance_scale=1.0,
        prompts=1, prompts_sha256="", seeds=1, auto=plans,
    )  # fmt: skip


CASES = [
    ("flux", "ddim", ("output",)),
    ("flux", "dpm", ("blocks[1:]", "attention")),
    ("pixart", "ddim", ("output", "blocks[1:]")),
    ("flux", "ancestral", ("output",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2][0]}")
def test_a_found_plan_replays_to_the_latents_that_were_judged(case):
    name, scheduler, candidates = case
    component, table = component_of(name), table_of(scheduler)
    layout = layout_of(component)
    subject_walk = SearchWalk(component, layout, table, Auto(candidates=candidates), 1.0)
    run = run_of(component, table, 4)
    for fitted in found(*case):
        settings = Auto(budget=min(fitted.cost + 1e-6, 0.99))
        one = calibration_of(table, (fitted.model_copy(update={"fewer_steps_psnr_db": 0.0}),))
        planned = make_plans(settings, layout, {STEPS: table}, one)
        followed = subject_walk.follow_path(stack_runs([run]), zip(fitted.skips, fitted.weights, strict=True))
        sites_and_inputs = (component, planned, planned.plans[0], run.latents)
        replayed = peers.ours(*sites_and_inputs, inputs=run.inputs, noise=run.noise)
        # the same variants in the same order; weights pass through float32 in both
        assert torch.allclose(replayed.latents, followed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2][0]}")
def test_plans_rise_in_cost_and_in_quality_and_skip_as_they_say(case):
    plans = found(*case)
    assert plans
    assert [p.cost for p in plans] == sorted(p.cost for p in plans)
    quality = [p.held_out_psnr_db for p in plans]
    assert quality == sorted(quality)
    for p in plans:
        assert p.cost <= 0.8
        assert p.skips[0] == ""
        assert len(set(p.skips)) <= 3
        assert [bool(w) for w in p.weights] == [bool(s) for s in p.skips]
        if case[2] == ("output",):
            assert p.cost == pytest.approx(p.skips.count("") / STEPS)


def test_fitted_weights_beat_reuse_of_the_same_steps_on_other_prompts():
    component, table = component_of("flux"), table_of("ddim")
    walk = SearchWalk(component, layout_of(component), table, Auto(candidates=("output",)), 1.0)
    others = walk.computed(stack_runs([run_of(component, table, seed) for seed in (7, 8)]))
    for fitted in found("flux", "ddim", ("output",))[1:]:
        path = list(zip(fitted.skips, fitted.weights, strict=True))
        reuse = [(skip, dict.fromkeys(weights, (1.0, 0.0, 0.0))) for skip, weights in path]
        error, reused = ((walk.follow_path(others, p) - others.uncached[-1]).norm() for p in (path, reuse))
        assert error < reused


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
def test_runs_that_are_walked_together_end_where_each_ends_alone(name):
    component, table = component_of(name), table_of("ddim", 2)
    runs = [run_of(component, table, seed) for seed in (7, 8)]
    walk = SearchWalk(component, layout_of(component), table, Auto(candidates=("output",)), 1.0)
    together = walk.computed(stack_runs(runs)).uncached[-1]
    apart = torch.cat([walk.computed(stack_runs([run])).uncached[-1] for run in runs])
    # a batch of two against two of one: float32 sums in another order
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5 * float(apart.abs().max()))
    assert (apart[0] - apart[1]).norm() > 0.1 * apart[0].norm()  # the canary


def test_a_trajectory_that_is_linear_in_its_slots_is_fitted_exactly():
    generator = torch.Generator().manual_seed(0)
    slots = [torch.randn(500, generator=generator) for _ in range(3)]
    aim = 2.0 * slots[0] - 1.5 * slots[1] + 0.25 * slots[2]
    # the ridge pulls weights of independent values towards 0 by RIDGE squared, and no more
    assert least_squares([aim], [slots], 3) == pytest.approx((2.0, -1.5, 0.25), rel=5 * RIDGE**2, abs=5 * RIDGE**2)
    assert least_squares([aim], [slots[:1]], 3)[1:] == (0.0, 0.0)


def test_the_aim_leads_back_to_the_uncached_run():
    component, table = component_of("flux"), table_of("dpm")
    walk = SearchWalk(component, layout_of(component), table, Auto(candidates=("output",)), 1.0)
    examples = walk.computed(stack_runs([run_of(component, table, 0)]))
    state = walk.evaluate_step(walk.start(examples), examples, ("", {}))
    astray = walk.evaluate_step(state, examples, ("output", {"output": (0.7, 0.0, 0.0)}))
    moved = walk.apply_output(astray, examples, walk.target_output(astray, examples), ("", {}), 1.0)
    assert torch.allclose(moved.latents, examples.uncached[3], rtol=0, atol=1e-4)  # divided by an update of about 0.1
    assert not torch.allclose(astray.latents, examples.uncached[2], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.compiles
def test_a_found_plan_compiles_to_itself():
    component, table = component_of("flux"), table_of("ddim")
    fitted = found("flux", "ddim", ("output",))[-1].model_copy(update={"fewer_steps_psnr_db": 0.0})
    planned = make_plans(Auto(budget=0.9), layout_of(component), {STEPS: table}, calibration_of(table, (fitted,)))
    latents = run_of(component, table, 4).latents
    eager = peers.ours(component, planned, planned.plans[0], latents)
    assert (
        compiled_run("flux", component, planned, planned.plans[0], latents).error(eager) < 2e-5
    )  # sums in another order
    everything = make_plans(NoCache(), layout_of(component), {STEPS: table})
    plain = peers.ours(component, everything, everything.plans[0], latents)
    assert peers.ours(component, planned, planned.plans[1], latents).error(plain) == 0
    assert plain.error(eager) > 1e-4


PLANS = tuple(
    FittedPlan(
        cost=cost,
        skips=(),
        weights=(),
        psnr_db=psnr + 1,
        held_out_psnr_db=psnr,
        fewer_steps=4,
        fewer_steps_psnr_db=30.0,
    )
    for cost, psnr in ((0.2, 28.0), (0.4, 36.0), (0.5, 44.0))
)


@pytest.mark.parametrize(
    ("budget", "cost"), [(0.45, 0.4), (0.4, 0.4), (0.9, 0.5), (Floor(psnr=35), 0.4), (Floor(psnr=40), 0.5)]
)
def test_a_budget_takes_the_best_and_a_floor_the_cheapest(budget, cost):
    assert choose_plan(Auto(budget=budget), PLANS).cost == cost


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.1, "no plan of the calibration has at most 0.1 of the cost; it has 0.20: 28.0 dB, 0.40: 36.0 dB"),
        (Floor(psnr=50), "no plan of the calibration has at least 50 dB"),
        (0.3, "the best plan has 28.0 dB, and 4 plain steps at no more cost have 30.0; take cache.method=none"),
    ],
)
def test_a_budget_without_a_worthy_plan_is_refused(budget, message):
    with pytest.raises(ExportError, match=message):
        choose_plan(Auto(budget=budget), PLANS)


def test_a_model_without_a_calibration_is_told_the_command():
    component, table = component_of("flux"), table_of("ddim")
    with pytest.raises(ExportError, match="run `prebake calibrate"):
        make_plans(Auto(), layout_of(component), {STEPS: table})


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("blocks[9:]", "selects nothing; the model has 3 transformer blocks"),
        ("mlp", "expected 'output', 'attention' or"),
    ],
)
def test_a_candidate_that_the_model_lacks_is_refused(candidate, message):
    component = component_of("flux")
    with pytest.raises(ExportError, match=message):
        SearchWalk(component, layout_of(component), table_of("ddim"), Auto(candidates=(candidate,)), 1.0)


def test_both_kinds_of_budget_are_read():
    assert Auto.model_validate({"budget": 0.35}).budget == 0.35
    assert Auto.model_validate({"budget": {"psnr": 40.0}}).budget == Floor(psnr=40)
    with pytest.raises(ValidationError):
        Auto.model_validate({"budget": 1.5})


def test_seeds_of_one_prompt_are_never_on_both_sides():
    runs = [(prompt, seed) for prompt in range(7) for seed in range(3)]
    fit, judge = split_runs(runs, 3, Auto())
    assert {prompt for prompt, _ in fit} == {0, 3, 6}
    assert not {prompt for prompt, _ in fit} & {prompt for prompt, _ in judge}
    with pytest.raises(RecipeError, match="judged by others, and there is 1; give more"):
        split_runs(runs[:3], 3, Auto())


def test_a_floor_takes_a_dearer_plan_where_the_cheapest_loses_to_plain_steps():
    losing = PLANS[1].model_copy(update={"cost": 0.3, "fewer_steps_psnr_db": 40.0})
    assert choose_plan(Auto(budget=Floor(psnr=35)), (losing, PLANS[2])).cost == 0.5


def test_a_shipped_recipe_finds_the_calibration_that_it_names():
    for name in recipe_names():
        if file := getattr(resolve(name).cache, "calibration", None):
            assert read_calibration(find_calibration(file, None)).auto


def test_otherwise_must_be_a_mask():
    assert Auto(otherwise="11(01)").fallback().mask == "11(01)"
    with pytest.raises(ValidationError, match="otherwise"):
        Auto(otherwise="0110")
