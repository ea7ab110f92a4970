"""FORA (Selvaraju et al. 2024, arXiv:2407.01425): every transformer block returns its last output, every few steps.

The first `start_step` evaluations compute, and from there every `interval`-th: at `i` if `i < start_step` or
`(i - start_step) % interval == 0`. Whole blocks are reused, as in pruna's FORA for FLUX (algorithms/fora.py), not the
attention and feed-forward outputs that the paper keeps, so a skipped step runs only what lies outside of the blocks:
the embeddings and the output's norm and projection. Nothing there reads any block's output but the last one's, so all
blocks of a branch are one site, which stores that. A UNet's blocks are its down, middle and up blocks.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from ...runtime.errors import ExportError
from ..sites.layout import Layout, Place
from ..sites.marks import Mark
from .common.method import CacheMethod
from .common.schedule import Decision, Schedule, Trajectory


class Fora(CacheMethod):
    """Whole blocks are reused between steps; names, meaning and defaults of pruna's FORA.

    The first `start_step` evaluations compute, then one in `interval`. arXiv:2407.01425.
    """

    method: Literal["fora"] = "fora"
    interval: int = Field(default=2, ge=1)
    start_step: int = Field(default=2, ge=0)


def schedule(cache: Fora, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """One site for each branch: all its blocks, as the last one's output. Raises ExportError where there are none."""
    marks = tuple(mark_blocks(layout, branch) for branch in layout.branches)

    def decide(i: int) -> Decision:
        computes = i < cache.start_step or (i - cache.start_step) % cache.interval == 0
        return Decision() if computes else Decision.reuse(*marks)

    return Schedule(marks, tuple(decide(i) for i in range(len(trajectory.timesteps))))


def mark_blocks(layout: Layout, branch: str) -> Mark:
    """The site of what the last block of a branch returns; it stands for the work of all of them."""
    chosen = find_blocks(layout, branch)
    return Mark(f"{branch}/blocks" if branch else "blocks", tuple(p.path for p in chosen), chosen[-1].streams)


def find_blocks(layout: Layout, branch: str) -> tuple[Place, ...]:
    """The transformer blocks of one branch, or a UNet's own."""
    layers = layout.of("layer", branch=branch)
    found = layout.blocks(branch) or tuple(
        p for p in layers if re.fullmatch(r"(down|up)_blocks\.\d+|mid_block", p.name)
    )
    if not found:
        raise ExportError(f"cache.method 'fora' reuses blocks, and this model has none; it has {layout.names(layers)}")
    return found
