"""Pyramid Attention Broadcast (Zhao et al. 2024, arXiv:2408.12588), exactly as diffusers decides it.

An attention computes when `iteration == 0`, when its timestep lies outside the exclusive window, or when
`iteration % skip_range == 0`; else it returns its last output. `iteration` counts every evaluation since the start, in
and out of the window, so the phase is locked to step 0 (diffusers hooks/pyramid_attention_broadcast.py, 0.42.1).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...runtime.errors import ExportError
from ..layout import Layout
from ..tables import Conflicts, Regex, Table
from .schedule import Decision, Schedule, Trajectory


class PyramidAttentionBroadcast(Table):
    """Attention outputs are reused between steps; names and meaning of diffusers' `PyramidAttentionBroadcastConfig`.

    Attention computes where `timestep` is outside the open interval `spatial_attention_timestep_skip_range` and, inside
    it, at every `spatial_attention_block_skip_range`-th step. arXiv:2408.12588.
    """

    method: Literal["pab"] = "pab"
    spatial_attention_block_skip_range: int = Field(default=2, ge=2)
    spatial_attention_timestep_skip_range: Annotated[tuple[int, int], Field(strict=False)] = (100, 800)
    spatial_attention_block_identifiers: Annotated[tuple[Regex, ...], Field(strict=False, min_length=1)] = (
        "blocks",
        "transformer_blocks",
        "single_transformer_blocks",
        "layers",
        "visual_transformer_blocks",
    )

    @model_validator(mode="after")
    def _range_is_open(self) -> PyramidAttentionBroadcast:
        low, high = self.spatial_attention_timestep_skip_range
        if not 0 <= low < high <= 1000:
            raise Conflicts(
                (
                    ("spatial_attention_timestep_skip_range",),
                    f"key 'spatial_attention_timestep_skip_range': expected 0 <= low < high <= 1000, got [{low}, {high}]",
                )
            )
        return self


def schedule(cache: PyramidAttentionBroadcast, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """Self attention whose name matches an identifier. Raises ExportError when none does."""
    low, high = cache.spatial_attention_timestep_skip_range
    every = cache.spatial_attention_block_skip_range
    marks = tuple(
        a.mark()
        for a in layout.of("attention")
        if any(re.search(i, a.name) for i in cache.spatial_attention_block_identifiers)
    )
    if not marks:
        raise ExportError(
            f"cache.spatial_attention_block_identifiers {list(cache.spatial_attention_block_identifiers)} match no attention of the "
            f"model; it has {layout.names(layout.attentions)}"
        )

    def decide(iteration: int, timestep: float) -> Decision:
        if iteration == 0 or not low < timestep < high or iteration % every == 0:
            return Decision()
        return Decision.reuse(*marks)

    return Schedule(marks, tuple(decide(i, t) for i, t in enumerate(trajectory.timesteps)))
