"""No cache."""

from __future__ import annotations

from typing import Any, Literal

from ..sites.layout import Layout
from .common.method import CacheMethod
from .common.schedule import Decision, Schedule, Trajectory


class NoCache(CacheMethod):
    """Every step computes everything."""

    method: Literal["none"] = "none"


def schedule(cache: NoCache, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """No sites: nothing is stored, and nothing skipped."""
    return Schedule((), tuple(Decision() for _ in trajectory.timesteps))
