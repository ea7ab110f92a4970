"""Finite: numbers that a picture can be made of. One that is infinite or none of all makes a black picture, without a word."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, cast

import numpy as np
import torch

from .bounds import MAX_FLOAT32
from .errors import ArtifactError, RequestError
from .plan import Plan

EvaluationCallback = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


class NonfiniteError(ArtifactError):
    """What a graph has made of finite inputs is not finite."""


def refuse_nonfinite(name: str, value: Any) -> None:
    """Raises RequestError, naming the argument, for a number, a tensor or an array, or a list of them, that is not all finite
    in float32. What is none of these is for others to judge."""
    if isinstance(value, list | tuple):
        for each in value:
            refuse_nonfinite(name, each)
    elif isinstance(value, Real):
        number = cast(float, value)
        if not abs(number) <= MAX_FLOAT32:
            beyond = ", and float32 ends at 3.4e38" if number == number and abs(number) != math.inf else ""
            raise RequestError(f"{name}={value!r}: expected a finite number{beyond}")
    elif isinstance(value, torch.Tensor):
        if value.is_floating_point() and not is_finite(value.float()):
            raise RequestError(
                f"{name}: expected finite numbers, got {describe_nonfinite(value)}; look where it comes from"
            )
    elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
        refuse_nonfinite(name, torch.from_numpy(value))


def is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def describe_nonfinite(tensor: torch.Tensor) -> str:
    """How many of its numbers are none, or infinite."""
    nans, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor.float()).sum())
    counts = [f"{count} {word}" for count, word in ((nans, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(counts)} of {tensor.numel()}"


def watch_latents(plan: Plan, device: torch.device, watch: EvaluationCallback | None) -> EvaluationCallback | None:
    """What `replay` calls after each evaluation, with a look at the latents before. On the CPU alone: on a GPU a look waits for
    all that is queued, and `refuse_nonfinite_result` looks at the end."""
    if device.type != "cpu":
        return watch

    def seen(e: int, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
        if not is_finite(latents):
            raise NonfiniteError(describe_bad_latents(f"evaluation {e} of {len(plan.evaluations)}", plan, latents))
        return watch(e, output, latents) if watch else None

    return seen


def refuse_nonfinite_result(plan: Plan, latents: torch.Tensor) -> None:
    """Raises NonfiniteError unless the last latents are finite."""
    if not is_finite(latents):
        raise NonfiniteError(describe_bad_latents(f"one of {len(plan.evaluations)} evaluations", plan, latents))


def refuse_nonfinite_pictures(pictures: torch.Tensor) -> None:
    """Raises NonfiniteError unless what the decoder made of finite latents is finite."""
    if not is_finite(pictures):
        raise NonfiniteError(
            f"the decoder made {describe_nonfinite(pictures)} numbers of finite latents; export with precision.vae=float32"
        )


def describe_bad_latents(where: str, plan: Plan, latents: torch.Tensor) -> str:
    return (
        f"{where} of plan {plan.name!r}: the latents are not finite ({describe_nonfinite(latents)}); "
        "`prebake verify` says whether the artifact does this always: if so export in a wider precision, if not look at this process's "
        "OMP_ variables, or give other latents or embeddings"
    )
