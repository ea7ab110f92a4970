"""The sampler's tables against diffusers' own schedulers, run here the way that its pipelines run them."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers.schedulers
import numpy as np
import pytest
import torch

from prebake.exporter.plan.sampler import MAX_HISTORY, SchedulerTable, tabulate_scheduler
from prebake.runtime.errors import ExportError, RecipeError
from prebake.runtime.plan import Update
from support.scheduler_cases import (
    CASES,
    COUNTS,
    KARRAS,
    SD,
    UNCLIPPED,
    Case,
    flux,
    name,
    relative_error,
    replayed,
)

# `untouched` above 1e-6: the scheduler computes coefficients from differences of nearby float32 numbers (log-SNRs of
# neighbouring steps, 1 + sigma^2 with sigma = 4096), so its own loop is that far from its formula. Against the same
# formula in float64 all cases hold 1e-10.

REFUSED = {
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "CosineDPMSolverMultistepScheduler": "Brownian tree",
    "DiscreteDDIMScheduler": "discrete tokens",
    "DPMSolverSDEScheduler": "Brownian tree",
    "EntropyBoundScheduler": "discrete tokens",
    "HeliosDMDScheduler": "use HeliosScheduler",
    "KarrasVeScheduler": "use EulerDiscreteScheduler",
    "PiflowScheduler": "a grid of predictions per latent",
    "RePaintScheduler": "mixes in the image and the mask",
    "RFD4ProteinaScheduler": "multiplies with a mask",
    "ScoreSdeVeScheduler": "use EulerDiscreteScheduler",
    "ScoreSdeVpScheduler": "use EulerDiscreteScheduler",
    "VQDiffusionScheduler": "discrete tokens",
}

NO_SCHEDULE = {
    ("ConsistencyDecoderScheduler", 1): "Currently more than 2 inference steps",
    ("ConsistencyDecoderScheduler", 5): "Currently more than 2 inference steps",
    ("EulerDiscreteScheduler", 0): "expected a number of steps of 1 or more, got 0",
    ("EulerDiscreteScheduler", -3): "expected a number of steps of 1 or more, got -3",
    ("EulerDiscreteScheduler", 2.5): "expected a number of steps of 1 or more, got 2.5",
    ("DDIMScheduler", 1001): "has no schedule of 1001 steps",
    ("HeliosScheduler", 8): "has no schedule of 8 steps",
    ("LCMScheduler", 51): "has no schedule of 51 steps",
    ("MiniMaxH3Scheduler", 1): ">= 2",
    ("SCMScheduler", 8): "Intermediate timesteps",
    ("UnCLIPScheduler", 1): "division by zero",
}


def pipeline_calls(scheduler: Any) -> list[dict[str, Any]]:
    """What the loop of the scheduler's pipeline in diffusers passes to `step`."""
    times, name = scheduler.timesteps, type(scheduler).__name__
    if name == "SCMScheduler" or (name == "LTXEulerAncestralRFScheduler" and len(times) == len(scheduler.sigmas)):
        times = times[:-1]  # pipeline_sana_sprint.py, pipeline_ltx2_dfr.py
    if name == "DDPMWuerstchenScheduler":  # pipeline_stable_cascade.py
        return [{"timestep": t.expand(1)} for t in times[:-1]]
    if name == "UnCLIPScheduler":  # pipeline_unclip.py
        previous = [int(t) for t in times[1:]] + [None]
        return [{"timestep": t, "prev_timestep": p} for t, p in zip(times, previous, strict=True)]
    if name == "CogVideoXDPMScheduler":  # pipeline_cogvideox.py
        return [{"timestep": t, "timestep_back": times[i - 1] if i > 0 else None} for i, t in enumerate(times)]
    return [{"timestep": t} for t in times]


def own_loop(case: Case, n: int, outputs: Any, noises: Any, x: torch.Tensor, monkeypatch: Any, wide: bool) -> list:
    """The latents after each step of the scheduler itself; with `wide`, its float32 numbers are float64 ones."""
    scheduler, schedule = case.build(), case.schedule(n)
    custom = "sigmas" in schedule or "timesteps" in schedule
    scheduler.set_timesteps(**({} if custom else {"num_inference_steps": n}), **schedule)
    calls, results, result = pipeline_calls(scheduler), [], (None,)
    module = sys.modules[type(scheduler).__module__]
    if wide:
        monkeypatch.setattr(torch, "float32", torch.float64)
        for key, value in vars(scheduler).items():
            if torch.is_tensor(value) and value.is_floating_point():
                setattr(scheduler, key, value.double())
    for e, call in enumerate(calls):
        draw = lambda *a, dtype=torch.float32, e=e, **k: noises[e].to(dtype)  # noqa: E731
        monkeypatch.setattr(module, "randn_tensor", draw, raising=False)
        if "timestep_back" in call:
            call["old_pred_original_sample"] = result[-1]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, call["timestep"])
        result = scheduler.step(outputs[e], sample=x, **call, **case.step, return_dict=False)
        x = result[0]
        results.append(x)
    monkeypatch.undo()
    return results


def random_run(table: SchedulerTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(table.updates), 1, 4, 3, 5)
    outputs, noises = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return outputs, noises, table.init_noise_sigma * torch.randn(shape[1:], generator=generator, dtype=torch.float64)


def test_every_scheduler_is_tabulated_or_refused():
    exported = {n for n in dir(diffusers.schedulers) if n.endswith("Scheduler")}
    assert {case.scheduler for case in CASES}.isdisjoint(REFUSED)
    assert {case.scheduler for case in CASES} | set(REFUSED) == exported


@pytest.mark.parametrize(("case", "n"), [(case, n) for case in CASES for n in case.counts], ids=name)
def test_replay_equals_the_schedulers_own_loop(case, n, monkeypatch):
    table = tabulate_scheduler(case.build(), n, step_kwargs=case.step, **case.schedule(n))
    outputs, noises, x = random_run(table)
    ours = replayed(table, outputs, noises, x)
    in_float64 = own_loop(case, n, outputs, noises, x, monkeypatch, wide=True)
    assert relative_error(ours, in_float64) < 1e-10
    untouched = own_loop(case, n, outputs, noises, x, monkeypatch, wide=False)
    assert relative_error(ours, untouched) < case.untouched
    assert all(max(len(u.latents), len(u.outputs)) <= MAX_HISTORY for u in table.updates)
    assert all(map(math.isfinite, (*table.timesteps, *table.sigmas, *table.input_scales, table.init_noise_sigma)))


@pytest.mark.parametrize("case", [c for c in CASES if 8 in c.counts], ids=name)
def test_a_wrong_coefficient_is_noticed(case, monkeypatch):
    n = 8
    table = tabulate_scheduler(case.build(), n, step_kwargs=case.step, **case.schedule(n))
    outputs, noises, x = random_run(table)
    truth = own_loop(case, n, outputs, noises, x, monkeypatch, wide=True)
    updates, middle = list(table.updates), len(table.updates) // 2
    largest = max(("latents", "outputs"), key=lambda kind: abs(getattr(updates[middle], kind)[0]))
    newest, *older = getattr(updates[middle], largest)
    updates[middle] = updates[middle].model_copy(update={largest: (newest * 1.001, *older)})
    broken = replace(table, updates=tuple(updates))
    assert relative_error(replayed(broken, outputs, noises, x), truth) > 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if c.counts[-1] == 28], ids=name)
def test_inputs_and_timesteps_are_the_schedulers(case):
    n = case.counts[1]
    table = tabulate_scheduler(case.build(), n, step_kwargs=case.step, **case.schedule(n))
    scheduler, schedule = case.build(), case.schedule(n)
    scheduler.set_timesteps(**({} if "sigmas" in schedule else {"num_inference_steps": n}), **schedule)
    calls, x = pipeline_calls(scheduler), torch.ones(1, 4, 2, 2, dtype=torch.float64)
    assert table.timesteps == tuple(float(c["timestep"]) for c in calls)
    assert table.scheduler == case.scheduler
    assert sorted(table.steps) == list(table.steps)
    assert set(table.steps) <= set(range(n))
    if hasattr(scheduler, "scale_model_input"):
        scaled = scheduler.scale_model_input(x, calls[0]["timestep"])[0, 0, 0, 0].item()
        assert table.input_scales[0] == pytest.approx(scaled, rel=1e-6)


def test_flux_is_euler_in_exact_floats():
    scheduler = diffusers.schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    table = tabulate_scheduler(scheduler, 4, **flux(4))
    assert table.sigmas[-1] == 0.0
    assert table.timesteps == pytest.approx([1000 * s for s in table.sigmas[:-1]], rel=1e-6)
    steps = zip(table.sigmas, table.sigmas[1:], strict=False)
    assert table.updates == tuple(Update(latents=(1.0,), outputs=(after - now,)) for now, after in steps)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (diffusers.schedulers.EulerDiscreteScheduler(), (0, 1, 2)),
        (diffusers.schedulers.HeunDiscreteScheduler(), (0, 0, 1, 1, 2)),
        (diffusers.schedulers.PNDMScheduler(skip_prk_steps=True), (0, 0, 1, 2)),
    ],
)
def test_evaluations_know_their_step(scheduler, steps):
    assert tabulate_scheduler(scheduler, 3).steps == steps


@pytest.mark.parametrize("case", [c for c in CASES if c.counts == COUNTS], ids=name)
def test_a_used_scheduler_is_left_alone_and_tabulates_like_a_new_one(case):
    n = case.counts[2]
    used, x = case.build(), torch.zeros(1, 4, 2, 2)
    used.set_timesteps(**({} if "sigmas" in case.schedule(3) else {"num_inference_steps": 3}), **case.schedule(3))
    for call in pipeline_calls(used)[:2]:
        extra = {"old_pred_original_sample": None} if "timestep_back" in call else {}
        if hasattr(used, "scale_model_input"):
            used.scale_model_input(x, call["timestep"])
        used.step(x, sample=x, **call, **extra)
    before = copy.deepcopy(vars(used))
    table = tabulate_scheduler(used, n, step_kwargs=case.step, **case.schedule(n))
    assert str(vars(used)) == str(before)
    assert table == tabulate_scheduler(case.build(), n, step_kwargs=case.step, **case.schedule(n))


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheduler", "text"), REFUSED.items())
def test_what_has_no_table_is_refused_by_name(scheduler, text):
    nameplate = type(scheduler, (), {})()  # refused before it is touched: some need packages that are not installed
    with pytest.raises(ExportError, match=f"^{scheduler} cannot become a table.*{text}"):
        tabulate_scheduler(nameplate, 4)


@pytest.mark.parametrize(
    ("scheduler", "config", "way_out"),
    [
        ("DDPMScheduler", {}, "set clip_sample=False"),
        ("DDIMScheduler", {**UNCLIPPED, "thresholding": True}, "set thresholding=False"),
        ("CMStochasticIterativeScheduler", {}, "set clip_denoised=False"),
        ("DDPMScheduler", {**UNCLIPPED, "variance_type": "learned_range"}, "use a fixed variance_type"),
        ("PNDMScheduler", {}, "set skip_prk_steps=True"),
        ("FlowMatchLCMScheduler", {"scale_factors": [0.5] * 7, "upscale_mode": "nearest"}, "set scale_factors=None"),
        ("UniPCMultistepScheduler", {**SD, "solver_order": 5}, "use a lower solver_order"),
    ],
)
def test_settings_without_a_table_are_refused_with_the_way_out(scheduler, config, way_out):
    with pytest.raises(ExportError, match=rf"^{scheduler}.*{way_out}"):
        tabulate_scheduler(getattr(diffusers.schedulers, scheduler)(**config), 12)


class Euler(diffusers.schedulers.EulerDiscreteScheduler):
    """Takes a step and then does to the latents what no table can."""

    spoil = staticmethod(lambda x: x)

    def step(self, model_output, timestep, sample, return_dict=True):
        return (self.spoil(super().step(model_output, timestep, sample, return_dict=False)[0]),)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x + 1e-6,
        lambda x: x.clamp(-100, 100),
        lambda x: x * (1 + 1e-6 * x.square().mean()),
        lambda x: x.roll(1, dims=-1),
        lambda x: x + torch.rand_like(x),
        lambda x: x * 2 / x.abs().amax().clamp(min=2),
    ],
    ids=["offset", "clip", "norm", "roll", "rand", "quantile"],
)
def test_what_is_not_linear_is_found_without_a_flag(spoil):
    scheduler = Euler(**SD)
    assert len(tabulate_scheduler(scheduler, 5).updates) == 5
    scheduler.spoil = spoil
    with pytest.raises(ExportError, match=r"^Euler "):
        tabulate_scheduler(scheduler, 5)


def test_a_step_that_needs_more_is_refused():
    class Masked(diffusers.schedulers.EulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, mask, return_dict=True): ...

    with pytest.raises(ExportError, match=r"^Masked cannot become a table: its step also needs mask"):
        tabulate_scheduler(Masked(), 5)


@pytest.mark.parametrize(("key", "text"), NO_SCHEDULE.items(), ids=str)
def test_a_schedule_that_does_not_exist_is_a_recipe_error(key, text):
    config = UNCLIPPED if key[0] in ("DDIMScheduler", "UnCLIPScheduler") else {}
    with pytest.raises(RecipeError, match=rf"^{key[0]}.*{text}"):
        tabulate_scheduler(getattr(diffusers.schedulers, key[0])(**config), key[1])


def test_sigmas_must_make_the_number_of_steps():
    scheduler = diffusers.schedulers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(RecipeError, match="the given sigmas make 4 steps, not 8"):
        tabulate_scheduler(scheduler, 8, sigmas=np.linspace(1, 1 / 4, 4))


def test_coefficients_that_are_not_finite_are_a_recipe_error():
    scheduler = diffusers.schedulers.UniPCMultistepScheduler(solver_type="bh1")
    with pytest.raises(RecipeError, match=r"evaluation 7 are not finite.*final_sigmas_type='sigma_min'"):
        tabulate_scheduler(scheduler, 8)


# A known ODE: data of normal distribution with deviation 1/2, for which the exact model and its flow are formulas ---------


def flow_spread(sigma: float) -> float:
    """Standard deviation of (1 - sigma) data + sigma noise; the flow of the ODE scales x by it."""
    return math.hypot((1 - sigma) / 2, sigma)


def flow_velocity(x: float, sigma: float) -> float:
    return x * (sigma - (1 - sigma) / 4) / flow_spread(sigma) ** 2


def vp_spread(sigma: float) -> float:
    """Standard deviation of (data + sigma noise) / sqrt(1 + sigma^2)."""
    return math.hypot(0.5, sigma) / math.hypot(1, sigma)


def vp_epsilon(x: float, sigma: float) -> float:
    return x * math.hypot(1, sigma) * sigma / (0.25 + sigma**2)


def error_at_the_last_sigma_above_zero(table: SchedulerTable, model: Callable, spread: Callable) -> float:
    history, outputs = [spread(table.sigmas[0])], []
    for e, u in enumerate(table.updates[:-1]):
        outputs.append(model(history[e], table.sigmas[e]))
        x = sum(a * history[e - k] for k, a in enumerate(u.latents))
        history.append(x + sum(b * outputs[e - k] for k, b in enumerate(u.outputs)))
    return abs(history[-1] - spread(table.sigmas[-2]))


@pytest.mark.parametrize(
    ("scheduler", "model", "spread", "order"),
    [
        ("FlowMatchEulerDiscreteScheduler", flow_velocity, flow_spread, 1),
        ("FlowMatchHeunDiscreteScheduler", flow_velocity, flow_spread, 2),
        ("DPMSolverMultistepScheduler", vp_epsilon, vp_spread, 2),
        ("UniPCMultistepScheduler", vp_epsilon, vp_spread, 3),
    ],
)
def test_the_table_solves_an_ode_with_the_schedulers_order(scheduler, model, spread, order):
    config = KARRAS if model is vp_epsilon else {}
    tables = [tabulate_scheduler(getattr(diffusers.schedulers, scheduler)(**config), n) for n in (40, 80)]
    coarse, fine = (error_at_the_last_sigma_above_zero(table, model, spread) for table in tables)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
