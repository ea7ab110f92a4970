"""The real scheduler, run where it can be watched: in float64, on the CPU, on given latents, outputs and noise.

A diffusers scheduler goes in; what its `step` returned comes out. `sampler.py` reads coefficients from that. What has
no coefficients is refused here by name, with the way out. The scheduler that was passed in is only ever copied.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...runtime.errors import ExportError, RecipeError

StepCall = dict[str, Any]  # what a pipeline passes to `step` in one evaluation, besides output and sample

TOKENS_REASON = "it samples discrete tokens, which is not linear; there is no table for it"
BROWNIAN_REASON = (
    "its noise comes from a Brownian tree; use DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'"
)
OWN_LOOP_REASON = "it is not driven by step(output, timestep, sample) alone; use EulerDiscreteScheduler"

REFUSED_CLASSES = {
    "AmusedScheduler": TOKENS_REASON,
    "BlockRefinementScheduler": TOKENS_REASON,
    "CosineDPMSolverMultistepScheduler": BROWNIAN_REASON,
    "DiscreteDDIMScheduler": TOKENS_REASON,
    "DPMSolverSDEScheduler": BROWNIAN_REASON,
    "EntropyBoundScheduler": TOKENS_REASON,
    "HeliosDMDScheduler": "its step re-noises with tensors that the pipeline passes in; use HeliosScheduler",
    "KarrasVeScheduler": OWN_LOOP_REASON,
    "PiflowScheduler": "its model returns a grid of predictions per latent, and an update has one coefficient for them",
    "RePaintScheduler": "its step mixes in the image and the mask; use DDIMScheduler and an inpainting model",
    "RFD4ProteinaScheduler": "its step multiplies with a mask that the pipeline passes in; there is no table for it",
    "ScoreSdeVeScheduler": OWN_LOOP_REASON,
    "ScoreSdeVpScheduler": OWN_LOOP_REASON,
    "VQDiffusionScheduler": TOKENS_REASON,
}

REFUSED_CONFIG = {
    "clip_sample": (bool, "clips the predicted sample, which is not linear; set clip_sample=False"),
    "clip_denoised": (bool, "clips the denoised sample, which is not linear; set clip_denoised=False"),
    "scale_factors": (bool, "resizes the latents between steps; set scale_factors=None"),
    "skip_prk_steps": (lambda v: v is False, "looks back 12 evaluations after its warm-up; set skip_prk_steps=True"),
    "thresholding": (bool, "clips at a quantile of the sample, which is not linear; set thresholding=False"),
    "variance_type": (lambda v: "learned" in (v or ""), "lets the model predict it; use a fixed variance_type"),
}
# CogVideoXDPMScheduler needs the last two; `list_step_calls` and `run_loop` pass them as its pipeline does.
STEP_ARGUMENTS = {"model_output", "timestep", "sample", "timestep_back", "old_pred_original_sample"}


def refuse_scheduler(scheduler: Any) -> None:
    """ExportError if the class, its config or the signature of `step` says that there is no table."""
    name = type(scheduler).__name__
    if name in REFUSED_CLASSES:
        raise ExportError(f"{name} cannot become a table of coefficients: {REFUSED_CLASSES[name]}")
    for key, (refused, reason) in REFUSED_CONFIG.items():
        if refused(scheduler.config.get(key)):
            raise ExportError(f"{name} with {key}={scheduler.config[key]!r} cannot become a table: it {reason}")
    wanted = [p.name for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    if unknown := sorted(set(wanted) - STEP_ARGUMENTS):
        raise ExportError(
            f"{name} cannot become a table: its step also needs {', '.join(unknown)}; use another scheduler"
        )


def prepare_scheduler(scheduler: Any, num_inference_steps: int, set_timesteps_kwargs: Mapping[str, Any]) -> Any:
    """A float64 copy of `scheduler` on the CPU, standing at the first timestep of its schedule.

    Calls `set_timesteps` as `retrieve_timesteps` of diffusers' pipelines does: custom sigmas or timesteps replace the
    number of steps. The schedule's numbers are computed in the scheduler's own precision and only then widened.
    Raises RecipeError when the scheduler has no such schedule.
    """
    name = type(scheduler).__name__
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise RecipeError(f"{name}: expected a number of steps of 1 or more, got {num_inference_steps!r}")
    custom = [key for key in ("sigmas", "timesteps") if set_timesteps_kwargs.get(key) is not None]
    count = {} if custom else {"num_inference_steps": num_inference_steps}
    fresh = copy.deepcopy(scheduler)
    try:
        fresh.set_timesteps(**count, device="cpu", **set_timesteps_kwargs)
    except Exception as error:  # schedulers raise whatever their arithmetic runs into
        raise RecipeError(f"{name} has no schedule of {num_inference_steps} steps: {describe_error(error)}") from error
    made = getattr(fresh, "num_inference_steps", None) or len(fresh.timesteps)
    if custom and made != num_inference_steps:
        raise RecipeError(f"{name}: the given {custom[0]} make {made} steps, not {num_inference_steps}")
    return begin_at(widen_to_float64(fresh), 0)


def begin_at(scheduler: Any, begin: int) -> Any:
    """A shallow copy that stands before timestep `begin` of its schedule, as pipelines leave it for a loop from there.

    Schedulers without `set_begin_index` find their place by the timestep that the first `step` is given.
    """
    fresh = copy.copy(scheduler)
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(begin)
    return fresh


def widen_to_float64(scheduler: Any) -> Any:
    """`scheduler` itself, its tensors on the CPU and the floating ones in float64."""
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            setattr(scheduler, key, value.to("cpu", torch.float64 if value.is_floating_point() else value.dtype))
    return scheduler


def list_step_calls(scheduler: Any, begin: int = 0) -> list[StepCall]:
    """What its diffusers pipelines pass to `step` at each evaluation of a loop that begins at timestep `begin`.

    `run_loop` adds `old_pred_original_sample`, which only a run can know, where there is a `timestep_back`.
    """
    times = list(scheduler.timesteps)[begin:]
    match type(scheduler).__name__:
        case "CogVideoXDPMScheduler":
            return [{"timestep": t, "timestep_back": back} for t, back in zip(times, [None, *times[:-1]], strict=True)]
        case "UnCLIPScheduler":
            return [{"timestep": t, "prev_timestep": to} for t, to in zip(times, [*times[1:], None], strict=True)]
        case "DDPMWuerstchenScheduler":  # the last timestep is only a target; one timestep per image
            return [{"timestep": t[None]} for t in times[:-1]]
        case "SCMScheduler":  # the last timestep is only a target
            return [{"timestep": t} for t in times[:-1]]
        case "LTXEulerAncestralRFScheduler" if begin + len(times) == len(
            scheduler.sigmas
        ):  # so it is with custom sigmas
            return [{"timestep": t} for t in times[:-1]]
    return [{"timestep": t} for t in times]


class Float64Mode(TorchFunctionMode):
    """A context in which float32 means float64, and in which normal noise is the next of `draws`.

    Many schedulers cast to float32 inside `step`; that rounding belongs to their loop and not to their coefficients.
    """

    def __init__(self, draws: Sequence[torch.Tensor]):
        super().__init__()
        self.draws = list(draws)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.randn_like):
            return self.draws.pop(0)
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def run_loop(
    scheduler: Any,
    calls: Sequence[StepCall],
    latents: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    noises: Sequence[Sequence[torch.Tensor]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What each step of a copy of `scheduler` returned, and what the model would have been given at each evaluation.

    Evaluation e starts from `latents[e]` where that exists, else from what the step before it returned. The model's
    answer is `outputs[e]` and its noise is drawn from `noises[e]`, all float64 and of one shape.
    Raises RecipeError when a step fails: schedulers do on step counts and settings that they do not support.
    """
    scheduler, results, inputs, result = copy.deepcopy(scheduler), [], [], (None,)
    scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    for e, call in enumerate(calls):
        x = latents[e] if e < len(latents) else results[-1]
        carried = {"old_pred_original_sample": result[-1]} if "timestep_back" in call else {}
        try:
            with Float64Mode(noises[e]):
                inputs.append(scale(x, call["timestep"]))
                result = scheduler.step(outputs[e], sample=x, **call, **carried, return_dict=False)
        except Exception as error:
            raise RecipeError(f"{type(scheduler).__name__} fails in evaluation {e}: {describe_error(error)}") from error
        results.append(result[0])
    return results, inputs


def read_marginals(scheduler: Any, calls: Sequence[StepCall]) -> tuple[tuple[float, float], ...] | None:
    """(image, noise) of the forward process before each evaluation: `add_noise`, or `scale_noise` in flow matching.

    Called as image-to-image pipelines do before a loop from there. Inpainting asks between two steps, for the timestep
    of the next evaluation, and gets the same: a scheduler that has stepped answers for where it stands.
    None where the scheduler has neither.
    """
    image, noise = torch.eye(2, dtype=torch.float64).view(2, 1, 1, 1, 2)  # each [B, C, H, W]
    pairs = []
    for e, call in enumerate(calls):
        here, at = begin_at(scheduler, e), call["timestep"].reshape(1)
        with Float64Mode(()):
            if hasattr(here, "add_noise"):
                noisy = here.add_noise(image, noise, at)
            elif hasattr(here, "scale_noise"):
                noisy = here.scale_noise(image, at, noise)
            else:
                return None
        x, z = noisy.flatten().tolist()
        pairs.append((x + 0.0, z + 0.0))
    return tuple(pairs)


def describe_error(error: Exception) -> str:
    """The kind and the first line of an error, for the end of a sentence."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
