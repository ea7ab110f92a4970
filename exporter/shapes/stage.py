"""A resumable training loop: one stage, one checkpoint file, one seed for each step.

What a step draws depends on (seed, stage, step) alone, so a run that was killed and started again gives the batches that
it would have had. A finished stage is only loaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..private_torch import copy_tensors, move_averages

SEED = 20261121


class ParameterEma:
    """Exponential moving average of a module's parameters, with a warm-up."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = list(module.parameters())
        self.mean = [p.detach().clone() for p in self.live]

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        move_averages(self.mean, [p.detach() for p in self.live], 1 - decay)

    def copy_into_module(self) -> None:
        for p, m in zip(self.live, self.mean, strict=True):
            p.data.copy_(m)


def run_stage(
    path: Path,
    module: torch.nn.Module,
    step: Callable[[int, np.random.Generator], torch.Tensor],
    *,
    steps: int,
    optimisers: Sequence[torch.optim.Optimizer],
    hold: float = 0.55,
    ema: float | None = None,
    save_every: int = 500,
    stop_at: int | None = None,
) -> None:
    """Trains `module` in place to `steps`, or to its EMA if `ema` is a decay; `step(i, rng)` gives the loss.

    Learning rates warm up for 100 steps, hold until the fraction `hold`, then fall linearly to 2%. `path` is the
    checkpoint, written whole or not at all; `stop_at` ends early, to look at a model that is half trained.
    """
    mean = ParameterEma(module, ema) if ema else None
    tops = [[group["lr"] for group in o.param_groups] for o in optimisers]
    first, spent = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=False)
        first, spent = saved["step"], saved["seconds"]
        module.load_state_dict(saved["module"])
        if mean:
            copy_tensors(mean.mean, saved["ema"])
        if first < steps:
            for o, state in zip(optimisers, saved["optimisers"], strict=True):
                o.load_state_dict(state)
        print(f"{path.stem}: {first} of {steps} steps done in {spent:.0f} s", flush=True)

    def save(at: int) -> None:
        state = {"step": at, "module": module.state_dict(), "seconds": spent + time.monotonic() - begun}
        state["ema"] = mean.mean if mean else None
        state["optimisers"] = [o.state_dict() for o in optimisers] if at < steps else None
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    stage_id = sum(path.stem.encode())
    begun, losses = time.monotonic(), []
    for i in range(first, min(steps, stop_at or steps)):
        factor = min(1.0, (i + 1) / 100, 0.02 + 0.98 * (steps - i) / (steps * (1 - hold)))
        for o, rates in zip(optimisers, tops, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            o.zero_grad(set_to_none=True)
        torch.manual_seed((SEED * 1000 + stage_id) * 100_000 + i)
        loss = step(i, np.random.default_rng((SEED, stage_id, i)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 1.0)
        for o in optimisers:
            o.step()
        if mean:
            mean.update(i)
        losses.append(loss.item())
        if (i + 1) % 100 == 0:
            rate = (time.monotonic() - begun) / (i + 1 - first)
            print(f"{path.stem} {i + 1}/{steps} loss {np.mean(losses[-100:]):.5f} {rate:.3f} s/step", flush=True)
        if (i + 1) % save_every == 0 or i + 1 == steps:
            save(i + 1)
    if mean:
        mean.copy_into_module()
