"""First Block Cache (ParaAttention's, as diffusers has it), frozen: where its runs on the calibration's prompts computed.

The first block always runs. An evaluation that skips adds to the first block's output what the other blocks added to it
when they last ran, to the hidden states and, where blocks return them, to the text's states. The rule that decides online
is in `calibrators/firstblock.py`; diffusers hooks/first_block_cache.py, 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from ...runtime.errors import ExportError
from ..sites.layout import Layout
from ..sites.marks import Mark
from .common.calibration import Calibration, FrozenCache, freeze_decisions
from .common.schedule import Decision, Schedule, Trajectory


class FirstBlockCache(FrozenCache):
    """All blocks but the first are skipped while the first one's residual stays close to what it was; `threshold` as in
    diffusers' `FirstBlockCacheConfig`, which decides once for both branches of guidance, as here with `guidance.branches =
    "batched"`; otherwise each branch has its own decisions. `quorum` and `calibration` as in every method that is frozen from calibration."""

    method: Literal["firstblock"] = "firstblock"
    threshold: float = Field(default=0.05, ge=0)


def marks(cache: FirstBlockCache, layout: Layout) -> tuple[Mark, ...]:
    """The sites of what blocks 1 to the last add, in each branch. Raises ExportError where there are fewer than two blocks."""
    count = len(layout.blocks(layout.branches[0]))
    if count < 2:
        raise ExportError(
            f"cache.method 'firstblock' skips all transformer blocks but the first, and the model has {count}; take another method"
        )
    return tuple(layout.residual(branch, 1, count) for branch in layout.branches)


def decision(cache: FirstBlockCache, layout: Layout, history: Sequence[Mapping[str, bool]]) -> Decision:
    """The branches that do not compute at the last entry of `history` reuse what their blocks added."""
    pairs = zip(layout.branches, marks(cache, layout), strict=True)
    return Decision.reuse(*(mark for branch, mark in pairs if not history[-1].get(branch, True)))


def schedule(
    cache: FirstBlockCache, layout: Layout, trajectory: Trajectory, calibration: Calibration | None
) -> Schedule:
    """The calibrated runs' decisions by majority, branch by branch."""
    chosen = marks(cache, layout)
    history = freeze_decisions(calibration, cache, layout.branches, trajectory.timesteps)
    return Schedule(chosen, tuple(decision(cache, layout, history[: e + 1]) for e in range(len(history))))
