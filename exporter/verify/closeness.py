"""Closeness: figures of how far apart two pictures, or two tensors, are, and what they say over several.

All are plain numbers. NaN is worse than any number and is never passed over.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

MIN_MSE = 1e-12  # pictures closer than this are equal: 120 dB


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures in 0..1, or of all frames of two videos, in dB, 120 at most. Not rounded to
    8 bits, which would end at 59."""
    mse = (a.double() - b.double()).square().mean().item()
    return mse if math.isnan(mse) else -10 * math.log10(max(mse, MIN_MSE))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two pictures [1, 3, H, W] in 0..1, or the mean over the frames of two videos
    [1, T, 3, H, W]; 1 is equal. scikit-image's, windows of 7 x 7."""
    from skimage.metrics import structural_similarity

    def similarity(x: np.ndarray, y: np.ndarray) -> float:
        similar: Any = structural_similarity(x, y, channel_axis=-1, data_range=1.0)
        return float(similar)

    stills = [t.reshape(-1, *t.shape[-3:]).permute(0, 2, 3, 1).double().cpu().numpy() for t in (a, b)]  # [T, H, W, 3]
    return statistics.fmean(map(similarity, *stills))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| in L2: 0 where both are zero, inf where only the reference is. NaN stays NaN."""
    difference, size = (value.double() - reference.double()).norm().item(), reference.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf


def largest_error(errors: Iterable[float]) -> float:
    """The largest, and NaN is larger than any: `max` would pass over it."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def smallest_psnr_db(found: Iterable[float]) -> float:
    """The smallest, and NaN is smaller than any: `min` would pass over it."""
    return min(found, key=lambda db: (not math.isnan(db), db))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The mean, and the ends of its 95 % confidence interval by Student's t, to 0.1; None for fewer than two values, which have
    none, and where one is no number."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    from scipy.special import stdtrit

    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return round(mean, 1), round(mean - half, 1), round(mean + half, 1)


def covered_share(count: int) -> float:
    """The share of all evaluations, 0..1, that 95 % confidence says are no worse than the worst of `count` drawn at random."""
    return 0.05 ** (1 / count)
