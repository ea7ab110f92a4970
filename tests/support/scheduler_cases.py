"""Schedulers with settings and numbers of steps, and what replays their tables: shared by the tests of whole plans and of tails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import diffusers.schedulers
import numpy as np
import torch

from prebake.exporter.plan.sampler import SchedulerTable

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

KARRAS = {**SD, "use_karras_sigmas": True}

UNCLIPPED = {"clip_sample": False}

COUNTS = (1, 2, 5, 8, 20, 28)


@dataclass(frozen=True)
class Case:
    """A scheduler with its settings; `untouched` is the tolerance against its loop in its own precision."""

    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    schedule: Callable[[int], dict[str, Any]] = lambda n: {}
    step: Mapping[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = (1, 5, 20)
    untouched: float = 1e-6

    @cached_property
    def built(self) -> Any:  # once: some constructors tabulate 1000 steps in Python
        return getattr(diffusers.schedulers, self.scheduler)(**self.config)

    def build(self) -> Any:
        return copy.deepcopy(self.built)


def flux(n: int) -> dict[str, Any]:
    return {"sigmas": np.linspace(1.0, 1 / n, n), "mu": 1.15}


def ltx(n: int) -> dict[str, Any]:
    return {"sigmas": np.linspace(1.0, 0.0, n + 1).tolist()}


def sana(n: int) -> dict[str, Any]:
    return {} if n == 2 else {"intermediate_timesteps": None}


CASES = (
    Case("CMStochasticIterativeScheduler", {"clip_denoised": False}, counts=COUNTS),
    Case("CogVideoXDDIMScheduler", {**UNCLIPPED, **ZERO_SNR}, counts=COUNTS),
    Case("CogVideoXDPMScheduler", {**UNCLIPPED, **ZERO_SNR}, counts=COUNTS),
    Case("CogVideoXDPMScheduler", UNCLIPPED),
    Case("ConsistencyDecoderScheduler", counts=(2,)),
    Case("DDIMInverseScheduler", UNCLIPPED, counts=COUNTS),
    Case("DDIMParallelScheduler", UNCLIPPED, counts=COUNTS),
    Case("DDIMParallelScheduler", UNCLIPPED, step={"eta": 0.5}),
    Case("DDIMScheduler", UNCLIPPED, counts=COUNTS),
    Case("DDIMScheduler", {**UNCLIPPED, **ZERO_SNR}),
    Case("DDIMScheduler", {**UNCLIPPED, "prediction_type": "sample", "set_alpha_to_one": False, "steps_offset": 1}),
    Case("DDIMScheduler", {**UNCLIPPED, **SD}, step={"eta": 1.0}, untouched=3e-6),
    Case("DDPMParallelScheduler", UNCLIPPED, counts=COUNTS),
    Case("DDPMScheduler", UNCLIPPED, counts=COUNTS),
    Case("DDPMScheduler", {**UNCLIPPED, "variance_type": "fixed_large", "prediction_type": "v_prediction"}),
    Case("DDPMScheduler", {**UNCLIPPED, "variance_type": "fixed_small_log"}),
    Case("DDPMScheduler", UNCLIPPED, lambda n: {"timesteps": list(range(900, 0, -(900 // n)))[:n]}, untouched=3e-6),
    Case("DDPMWuerstchenScheduler", counts=COUNTS),
    Case("DEISMultistepScheduler", SD, counts=COUNTS, untouched=2e-6),
    Case("DEISMultistepScheduler", {**SD, "solver_order": 1}),
    Case("DEISMultistepScheduler", {**SD, "solver_order": 3}, untouched=2e-5),
    Case("DEISMultistepScheduler", {**KARRAS, "prediction_type": "v_prediction"}, untouched=1e-5),
    Case("DEISMultistepScheduler", FLOW, untouched=1e-4),
    Case("DPMSolverMultistepScheduler", SD, counts=COUNTS),
    Case("DPMSolverMultistepScheduler", KARRAS),
    Case("DPMSolverMultistepScheduler", {**SD, "solver_order": 1}),
    Case("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}, untouched=3e-6),
    Case("DPMSolverMultistepScheduler", {**KARRAS, "algorithm_type": "sde-dpmsolver++"}, counts=COUNTS),
    Case("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}, untouched=3e-6),
    Case("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    Case(
        "DPMSolverMultistepScheduler",
        {**SD, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        untouched=3e-6,
    ),
    Case("DPMSolverMultistepScheduler", {**SD, "solver_type": "heun", "use_lu_lambdas": True}),
    Case("DPMSolverMultistepScheduler", FLOW),
    Case("DPMSolverMultistepInverseScheduler", SD, counts=COUNTS, untouched=1e-5),
    Case("DPMSolverMultistepInverseScheduler", {**SD, "solver_order": 3}, untouched=2e-5),
    Case("DPMSolverSinglestepScheduler", SD, counts=COUNTS),
    Case("DPMSolverSinglestepScheduler", {**KARRAS, "solver_order": 1}),
    Case("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3}),
    Case("EDMDPMSolverMultistepScheduler", counts=COUNTS),
    Case("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    Case("EDMEulerScheduler", counts=COUNTS, untouched=1e-5),
    Case("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}),
    Case("EulerAncestralDiscreteScheduler", SD, counts=COUNTS),
    Case("EulerAncestralDiscreteScheduler", {**SD, **ZERO_SNR}, untouched=1e-3),
    Case("EulerDiscreteScheduler", SD, counts=COUNTS),
    Case("EulerDiscreteScheduler", {**KARRAS, "timestep_spacing": "leading", "steps_offset": 1}),
    Case("EulerDiscreteScheduler", {**SD, **ZERO_SNR}, untouched=1e-4),
    Case("EulerDiscreteScheduler", SD, step={"s_churn": 4.0, "s_noise": 1.003}, untouched=3e-6),
    Case("EulerDiscreteScheduler", SD, lambda n: {"sigmas": [*np.geomspace(14.0, 0.03, n).tolist(), 0.0]}),
    Case("FlowMapEulerDiscreteScheduler", {"shift": 5.0}, counts=COUNTS),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, counts=COUNTS),
    Case("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, flux, counts=COUNTS),
    Case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, counts=COUNTS),
    Case("FlowMatchLCMScheduler", {"shift": 3.0}, counts=COUNTS),
    Case("HeliosScheduler", {"stages": 1}, counts=COUNTS),
    Case("HeliosScheduler", {"stages": 1, "scheduler_type": "euler"}),
    Case("HeliosScheduler", {"use_dynamic_shifting": True}, lambda n: {"stage_index": 1, "mu": 0.5}, untouched=1e-5),
    Case("HeunDiscreteScheduler", SD, counts=COUNTS),
    Case("HeunDiscreteScheduler", {**KARRAS, "prediction_type": "v_prediction"}, untouched=2e-6),
    Case("IPNDMScheduler", counts=COUNTS),
    Case("KDPM2AncestralDiscreteScheduler", SD, counts=COUNTS),
    Case("KDPM2AncestralDiscreteScheduler", {**KARRAS, "prediction_type": "v_prediction"}, untouched=1e-5),
    Case("KDPM2DiscreteScheduler", SD, counts=COUNTS),
    Case("KDPM2DiscreteScheduler", KARRAS),
    Case("LCMScheduler", SD, counts=COUNTS),
    Case("LCMScheduler", {"prediction_type": "v_prediction"}),
    Case("LCMScheduler", SD, lambda n: {"timesteps": list(range(999, 0, -(999 // n)))[:n]}),
    Case("LMSDiscreteScheduler", SD, counts=COUNTS),
    Case("LMSDiscreteScheduler", KARRAS, step={"order": 2}),
    Case("LTXEulerAncestralRFScheduler", counts=COUNTS),
    Case("LTXEulerAncestralRFScheduler", {"eta": 0.5}, ltx),
    Case("MiniMaxH3Scheduler", counts=COUNTS[1:]),
    Case("PNDMScheduler", {**SD, "skip_prk_steps": True}, counts=COUNTS),
    Case("PNDMScheduler", {**SD, "skip_prk_steps": True, "prediction_type": "v_prediction", "set_alpha_to_one": True}),
    Case("SASolverScheduler", SD, counts=COUNTS, untouched=2e-6),
    Case("SASolverScheduler", {**KARRAS, "predictor_order": 3, "corrector_order": 4}, untouched=1e-3),
    Case("SASolverScheduler", {**SD, "prediction_type": "v_prediction"}),
    Case("SCMScheduler", schedule=sana, counts=COUNTS),
    Case("TCDScheduler", SD, counts=COUNTS),
    Case("TCDScheduler", SD, step={"eta": 0.0}),
    Case("UnCLIPScheduler", UNCLIPPED, counts=COUNTS[1:], untouched=1e-5),
    Case("UniPCMultistepScheduler", SD, counts=COUNTS),
    Case("UniPCMultistepScheduler", {**SD, "solver_order": 1}),
    Case("UniPCMultistepScheduler", {**SD, "solver_order": 3}, counts=COUNTS, untouched=2e-5),
    Case("UniPCMultistepScheduler", {**KARRAS, "disable_corrector": [0]}),
    Case("UniPCMultistepScheduler", {**SD, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    Case("UniPCMultistepScheduler", FLOW),
)


def replayed(table: SchedulerTable, outputs: Any, noises: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """x' = sum latents[k] x[e-k] + sum outputs[k] m[e-k] + noise z[e], as `runtime/plan.py` says it."""
    history = [x]
    for e, u in enumerate(table.updates):
        x = u.noise * noises[e]
        for k, a in enumerate(u.latents):
            x = x + a * history[e - k]
        for k, b in enumerate(u.outputs):
            x = x + b * outputs[e - k]
        history.append(x)
    return history[1:]


def relative_error(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest error over the trajectory, relative to the largest value of the step where it is made."""
    assert len(ours) == len(truth)
    size = [max(t.abs().max().item(), 1e-30) for t in truth]
    return max((a - b).abs().max().item() / s for a, b, s in zip(ours, truth, size, strict=True))


def name(value: Any) -> str | None:
    if not isinstance(value, Case):
        return None
    settings = {**value.config, **value.step, "schedule": value.schedule.__name__}
    return value.scheduler + "-" + ",".join(str(v) for k, v in settings.items() if k not in SD and v != "<lambda>")
