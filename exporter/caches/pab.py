"""Pyramid Attention Broadcast (Zhao et al. 2024, arXiv:2408.12588), exactly as diffusers decides it.

An attention computes when `iteration == 0`, when its timestep lies outside the exclusive window, or when
`iteration % skip_range == 0`; else it returns its last output. `iteration` counts every evaluation since the start, in
and out of the window, so the phase is locked to step 0 (diffusers hooks/pyramid_attention_broadcast.py, 0.42.1).
diffusers' hook counts calls; ours counts evaluations of each branch of guidance, which is the same where a pipeline
runs both branches in one call.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..sites.layout import Layout
from .common.method import CacheMethod
from .common.schedule import Decision, Schedule, Trajectory
from .common.windows import AttentionGroup, Identifiers, TimestepWindow, assign_groups, is_in_window

SPATIAL_IDENTIFIERS = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
)
TEMPORAL_IDENTIFIERS = ("temporal_transformer_blocks",)
CROSS_IDENTIFIERS = ("blocks", "transformer_blocks", "layers")

SkipRange = Annotated[int, Field(ge=2)] | None


class PyramidAttentionBroadcast(CacheMethod):
    """Attention outputs are reused between steps; names and meaning of diffusers' `PyramidAttentionBroadcastConfig`.

    Attention computes where `timestep` is outside the open interval `*_attention_timestep_skip_range` and, inside it, at
    every `*_attention_block_skip_range`-th step; a kind of attention without a range always computes. Without any range,
    spatial attention has 2. arXiv:2408.12588.
    """

    method: Literal["pab"] = "pab"
    spatial_attention_block_skip_range: SkipRange = None
    temporal_attention_block_skip_range: SkipRange = None
    cross_attention_block_skip_range: SkipRange = None
    spatial_attention_timestep_skip_range: TimestepWindow = (100, 800)
    temporal_attention_timestep_skip_range: TimestepWindow = (100, 800)
    cross_attention_timestep_skip_range: TimestepWindow = (100, 800)
    spatial_attention_block_identifiers: Identifiers = SPATIAL_IDENTIFIERS
    temporal_attention_block_identifiers: Identifiers = TEMPORAL_IDENTIFIERS
    cross_attention_block_identifiers: Identifiers = CROSS_IDENTIFIERS

    def groups(self) -> tuple[AttentionGroup, ...]:
        """Spatial, temporal and cross attention, as far as they have a range, in diffusers' order of precedence."""
        spatial, temporal, cross = (
            self.spatial_attention_block_skip_range,
            self.temporal_attention_block_skip_range,
            self.cross_attention_block_skip_range,
        )
        if not (spatial or temporal or cross):
            spatial = 2
        chosen = []
        if spatial:
            window, names = self.spatial_attention_timestep_skip_range, self.spatial_attention_block_identifiers
            chosen.append(AttentionGroup("spatial_attention", "attention", spatial, window, names, SPATIAL_IDENTIFIERS))
        if temporal:
            window, names = self.temporal_attention_timestep_skip_range, self.temporal_attention_block_identifiers
            chosen.append(
                AttentionGroup("temporal_attention", "attention", temporal, window, names, TEMPORAL_IDENTIFIERS)
            )
        if cross:
            window, names = self.cross_attention_timestep_skip_range, self.cross_attention_block_identifiers
            chosen.append(AttentionGroup("cross_attention", "cross_attention", cross, window, names, CROSS_IDENTIFIERS))
        return tuple(chosen)


def schedule(cache: PyramidAttentionBroadcast, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """One site for each attention that an identifier takes. Raises ExportError when a kind with a range has none."""
    sites = [(group, place.mark()) for group, place in assign_groups(cache.groups(), layout, layout.attentions)]

    def decide(iteration: int, timestep: float) -> Decision:
        return Decision.reuse(*(mark for group, mark in sites if is_reused(group, iteration, timestep)))

    return Schedule(tuple(mark for _, mark in sites), tuple(decide(i, t) for i, t in enumerate(trajectory.timesteps)))


def is_reused(group: AttentionGroup, iteration: int, timestep: float) -> bool:
    return iteration % group.every != 0 and is_in_window(group.window, timestep)
