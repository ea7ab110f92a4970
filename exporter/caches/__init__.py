"""Cache methods: one small file each, with its recipe table and its policy.

A policy is a function `schedule(cache, layout, trajectory, calibration) -> Schedule`: from the table's parameters, the
model's layout and the steps' timesteps and sigmas to sites, actions and coefficients. It reads no tensor, so a plan for
another number of steps is resolved in microseconds. A new method adds its file and a line in `METHODS` and `Cache`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from ..layout import Layout
from . import fastercache, fora, magcache, mask, pab, taylorseer
from .fastercache import FasterCache
from .fora import Fora
from .magcache import MagCache
from .mask import Mask
from .none import NoCache
from .pab import PyramidAttentionBroadcast
from .schedule import Decision, Schedule, Trajectory
from .taylorseer import TaylorSeer

__all__ = [
    "METHODS",
    "Cache",
    "Decision",
    "FasterCache",
    "Fora",
    "MagCache",
    "Mask",
    "NoCache",
    "PyramidAttentionBroadcast",
    "Schedule",
    "TaylorSeer",
    "Trajectory",
    "schedule",
]

METHODS: Mapping[str, Any] = {
    "fastercache": fastercache,
    "fora": fora,
    "magcache": magcache,
    "mask": mask,
    "pab": pab,
    "taylorseer": taylorseer,
}

Cache = Annotated[
    NoCache | FasterCache | Fora | MagCache | Mask | PyramidAttentionBroadcast | TaylorSeer,
    Field(discriminator="method"),
]


def schedule(cache: Any, layout: Layout, trajectory: Trajectory, calibration: Any = None) -> Schedule:
    """The schedule of the recipe's `cache` table; with method "none" there are no sites and nothing is skipped."""
    if cache.method == "none":
        return Schedule((), tuple(Decision({}, {}) for _ in trajectory.timesteps))
    return METHODS[cache.method].schedule(cache, layout, trajectory, calibration)
