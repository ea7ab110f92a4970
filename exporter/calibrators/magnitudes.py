"""How much a residual's size changes from one evaluation to the next: the ratios that MagCache is given."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_ratio(previous: Tensor, current: Tensor) -> float:
    """The mean over tokens of |current| / |previous|, residuals [..., N, D] of two evaluations in a row, in float32.

    What diffusers' `MagCacheConfig(calibrate=True)` prints (hooks/mag_cache.py, 0.42.1); the first evaluation, which has
    no previous one, counts as 1.0 there.
    """
    before, now = (torch.linalg.norm(t.float(), dim=-1) for t in (previous, current))  # [..., N]
    return (now / (before + 1e-8)).mean().item()
