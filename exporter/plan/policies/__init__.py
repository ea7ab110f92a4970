"""Cache policies: one small file per method, from (parameters, model layout, timesteps) to sites and actions.

A policy is a function `schedule(cache, layout, timesteps, sigmas) -> Schedule`. It reads no tensor, so a plan for
another number of steps is resolved in microseconds. A new method adds its file, its entry here and its recipe table.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...sites import Action, Mark

POLICIES = {"pab": ".pab", "mask": ".mask"}


@dataclass(frozen=True)
class Attention:
    """An attention module: its site, and whether it attends to the prompt alone."""

    mark: Mark
    is_cross: bool = False


@dataclass(frozen=True)
class Layout:
    """What a family offers to policies: attention sites, and the blocks in the order in which they run.

    `blocks` are module paths; each takes and returns `streams` (see `Mark`).
    """

    attentions: tuple[Attention, ...]
    blocks: tuple[str, ...]
    streams: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """What one evaluation does: the action of every marked site, and the coefficients of those that combine."""

    actions: Mapping[str, Action]
    coefficients: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Schedule:
    """A policy's answer: the sites it uses and one decision per evaluation."""

    marks: tuple[Mark, ...]
    decisions: tuple[Decision, ...]


def schedule(cache: Any, layout: Layout, timesteps: tuple[float, ...], sigmas: tuple[float, ...]) -> Schedule:
    """The schedule of the recipe's `cache` table; with method "none" there are no sites and nothing is skipped."""
    if cache.method == "none":
        return Schedule((), tuple(Decision({}, {}) for _ in timesteps))
    return importlib.import_module(POLICIES[cache.method], __name__).schedule(cache, layout, timesteps, sigmas)
