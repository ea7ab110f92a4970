"""Pyramid Attention Broadcast (Zhao et al. 2024, arXiv:2408.12588), exactly as diffusers decides it.

An attention computes when `iteration == 0`, when its timestep lies outside the exclusive window, or when
`iteration % skip_range == 0`; else it returns its last output. `iteration` counts every evaluation since the start, in
and out of the window, so the phase is locked to step 0 (diffusers hooks/pyramid_attention_broadcast.py, 0.42.1).
"""

from __future__ import annotations

import re
from typing import Any

from ....runtime.errors import ExportError
from . import Decision, Layout, Schedule


def schedule(cache: Any, layout: Layout, timesteps: tuple[float, ...], sigmas: tuple[float, ...]) -> Schedule:
    """Self attention whose name matches an identifier. Raises ExportError when none does."""
    low, high = cache.spatial_attention_timestep_skip_range
    every = cache.spatial_attention_block_skip_range
    marks = tuple(
        a.mark
        for a in layout.attentions
        if not a.is_cross and any(re.search(i, a.mark.name) for i in cache.spatial_attention_block_identifiers)
    )
    if not marks:
        raise ExportError(
            f"cache.spatial_attention_block_identifiers {list(cache.spatial_attention_block_identifiers)} match no attention of the "
            f"model; it has {', '.join(a.mark.name for a in layout.attentions)}"
        )

    def decide(iteration: int, timestep: float) -> Decision:
        if iteration == 0 or not low < timestep < high or iteration % every == 0:
            return Decision({m.name: "compute" for m in marks}, {})
        return Decision({m.name: "combine" for m in marks}, {m.name: (1.0,) for m in marks})

    return Schedule(marks, tuple(decide(i, t) for i, t in enumerate(timesteps)))
