"""Cache methods: one small file each, with its recipe table and its policy.

A policy is a function `schedule(cache, layout, trajectory, calibration) -> Schedule`: from the table's parameters, the
model's layout and the steps' timesteps and sigmas to sites, actions and coefficients. It reads no tensor, so a plan for
another number of steps is resolved in microseconds. A new method adds its file and a line in `METHODS` and `Cache`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from ..sites.layout import Layout
from . import (
    auto,
    dbcache,
    deepcache,
    fastercache,
    firstblock,
    fora,
    layer_skip,
    magcache,
    mask,
    pab,
    smoothcache,
    taylorseer,
    teacache,
)
from .auto import Auto
from .common.schedule import Decision, Schedule, Trajectory
from .dbcache import DBCache
from .deepcache import DeepCache
from .fastercache import FasterCache
from .firstblock import FirstBlockCache
from .fora import Fora
from .layer_skip import LayerSkip
from .magcache import MagCache
from .mask import Mask
from .none import NoCache
from .pab import PyramidAttentionBroadcast
from .smoothcache import SmoothCache
from .taylorseer import TaylorSeer
from .teacache import TeaCache

__all__ = [
    "METHODS",
    "Auto",
    "Cache",
    "DBCache",
    "Decision",
    "DeepCache",
    "FasterCache",
    "FirstBlockCache",
    "Fora",
    "LayerSkip",
    "MagCache",
    "Mask",
    "NoCache",
    "PyramidAttentionBroadcast",
    "Schedule",
    "SmoothCache",
    "TaylorSeer",
    "TeaCache",
    "Trajectory",
    "schedule",
]

METHODS: Mapping[str, Any] = {
    "auto": auto,
    "dbcache": dbcache,
    "deepcache": deepcache,
    "fastercache": fastercache,
    "firstblock": firstblock,
    "fora": fora,
    "layer_skip": layer_skip,
    "magcache": magcache,
    "mask": mask,
    "pab": pab,
    "smoothcache": smoothcache,
    "taylorseer": taylorseer,
    "teacache": teacache,
}

Cache = Annotated[
    NoCache
    | Auto
    | DBCache
    | DeepCache
    | FasterCache
    | FirstBlockCache
    | Fora
    | LayerSkip
    | MagCache
    | Mask
    | PyramidAttentionBroadcast
    | SmoothCache
    | TaylorSeer
    | TeaCache,
    Field(discriminator="method"),
]


def schedule(cache: Any, layout: Layout, trajectory: Trajectory, calibration: Any = None) -> Schedule:
    """The schedule of the recipe's `cache` table; with method "none" there are no sites and nothing is skipped."""
    if cache.method == "none":
        return Schedule((), tuple(Decision({}, {}) for _ in trajectory.timesteps))
    return METHODS[cache.method].schedule(cache, layout, trajectory, calibration)
