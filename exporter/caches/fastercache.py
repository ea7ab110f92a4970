"""FasterCache (Lyu et al. 2024, arXiv:2410.19355), exactly as diffusers decides it (hooks/faster_cache.py, 0.42.1).

Attention that is skipped continues its last two outputs: y1 + w (y1 - y2), where what was continued counts as an output.
With guidance, the unconditional branch is skipped too, and rebuilt from the conditional one: cond + a L + b H, where
L + H is uncond - cond as it was when both last ran, split by frequency, and a and b are running products of the alphas.
The split is linear, so nothing is transformed in a step that skips. That gives three variants: both branches; the
conditional one; the conditional one with its attentions continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ...runtime.errors import ExportError, RecipeError
from ..sites.layout import Layout
from ..sites.marks import Mark
from .common.method import CacheMethod
from .common.schedule import Decision, Schedule, Trajectory
from .common.windows import AttentionGroup, Identifiers, TimestepWindow, assign_groups, is_in_window, search_places

SPATIAL_IDENTIFIERS = ("^blocks.*attn", "^transformer_blocks.*attn", "^single_transformer_blocks.*attn")
TEMPORAL_IDENTIFIERS = ("^temporal_transformer_blocks.*attn",)
CANDIDATE_IDENTIFIERS = SPATIAL_IDENTIFIERS + TEMPORAL_IDENTIFIERS
"""diffusers puts hooks on attentions with these names only; a recipe's identifiers choose among them."""

LOW_MARK = Mark("low", ("uncond", "low"), ("x",))
HIGH_MARK = Mark("high", ("uncond", "high"), ("x",))
"""The two parts of the difference between the branches. They stand for all of `uncond`, which runs for them alone
(`guidance.GuidedDenoiser`)."""

EvaluationWeights = float | Annotated[tuple[float, ...], Field(strict=False, min_length=1)]


class FasterCache(CacheMethod):
    """Attention is extrapolated and the unconditional branch rebuilt from the conditional one; names and meaning of
    diffusers' `FasterCacheConfig`, whose callbacks are numbers here: one for all evaluations, or a list of one for each.

    `attention_weight` is w in y1 + w (y1 - y2). `low_frequency_weight` and `high_frequency_weight` replace what
    `alpha_low_frequency` and `alpha_high_frequency` and their windows say. A guidance-distilled model
    (`is_guidance_distilled`, FLUX) has no unconditional branch to skip. `tensor_format` is accepted and changes nothing:
    in all three formats the planes that are split by frequency are the last two dimensions. arXiv:2410.19355.
    """

    method: Literal["fastercache"] = "fastercache"
    spatial_attention_block_skip_range: int = Field(default=2, ge=1)
    temporal_attention_block_skip_range: Annotated[int, Field(ge=1)] | None = None
    spatial_attention_timestep_skip_range: TimestepWindow = (-1, 681)
    temporal_attention_timestep_skip_range: TimestepWindow = (-1, 681)
    low_frequency_weight_update_timestep_range: TimestepWindow = (99, 901)
    high_frequency_weight_update_timestep_range: TimestepWindow = (-1, 301)
    alpha_low_frequency: float = 1.1
    alpha_high_frequency: float = 1.1
    unconditional_batch_skip_range: int = Field(default=5, ge=1)
    unconditional_batch_timestep_skip_range: TimestepWindow = (-1, 641)
    spatial_attention_block_identifiers: Identifiers = SPATIAL_IDENTIFIERS
    temporal_attention_block_identifiers: Identifiers = TEMPORAL_IDENTIFIERS
    attention_weight: EvaluationWeights = 0.5
    low_frequency_weight: EvaluationWeights | None = None
    high_frequency_weight: EvaluationWeights | None = None
    tensor_format: Literal["BCFHW", "BFCHW", "BCHW"] = "BCFHW"
    is_guidance_distilled: bool = False

    @property
    def needs_planes(self) -> bool:
        """Whether the denoiser must be built with `guided(..., planes=(H, W))`."""
        return not self.is_guidance_distilled

    def groups(self) -> tuple[AttentionGroup, ...]:
        """Spatial and temporal attention, in diffusers' order of precedence; a range of 1 never skips."""
        spatial, temporal = self.spatial_attention_block_skip_range, self.temporal_attention_block_skip_range
        chosen = []
        if spatial > 1:
            window, names = self.spatial_attention_timestep_skip_range, self.spatial_attention_block_identifiers
            chosen.append(AttentionGroup("spatial_attention", "attention", spatial, window, names, SPATIAL_IDENTIFIERS))
        if temporal and temporal > 1:
            window, names = self.temporal_attention_timestep_skip_range, self.temporal_attention_block_identifiers
            chosen.append(
                AttentionGroup("temporal_attention", "attention", temporal, window, names, TEMPORAL_IDENTIFIERS)
            )
        return tuple(chosen)


def schedule(cache: FasterCache, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """Sites: the attentions of the conditional branch (of all, if distilled), and the difference between the branches.

    Raises ExportError where identifiers take no attention, or the denoiser does not have the branches that are needed,
    and RecipeError for a list of weights of another length than the evaluations.
    """
    check_branches(cache, layout)
    parts = () if cache.is_guidance_distilled else (LOW_MARK, HIGH_MARK)
    candidates = [
        p for p in search_places(CANDIDATE_IDENTIFIERS, layout.of("attention")) if not parts or p.branch == "cond"
    ]
    sites = [(g, p.mark(slots=2, emitted=True)) for g, p in assign_groups(cache.groups(), layout, candidates)]
    attention_weights = evaluation_weights(cache, "attention_weight", len(trajectory.timesteps))
    rebuilt = frequency_weights(cache, trajectory.timesteps)
    decisions = []
    for e, t in enumerate(trajectory.timesteps):
        coefficients: dict[str, tuple[float, ...]] = {}
        if rebuilt[e]:
            coefficients |= {mark.name: (part,) for mark, part in zip(parts, rebuilt[e], strict=True)}
        if e > 0 and (cache.is_guidance_distilled or rebuilt[e]):
            w = attention_weights[e]
            skipped = (mark for g, mark in sites if e % g.every != 0 and is_in_window(g.window, t))
            coefficients |= {mark.name: (1.0 + w, -w) for mark in skipped}
        decisions.append(Decision(dict.fromkeys(coefficients, "combine"), coefficients))
    return Schedule((*parts, *(mark for _, mark in sites)), tuple(decisions))


def frequency_weights(cache: FasterCache, timesteps: Sequence[float]) -> list[tuple[float, ...]]:
    """The factors of low and high frequencies at each evaluation, or () where both branches run.

    The weights of consecutive skips multiply up, as in diffusers and in the authors' code.
    """
    lows = evaluation_weights(cache, "low_frequency_weight", len(timesteps))
    highs = evaluation_weights(cache, "high_frequency_weight", len(timesteps))
    low = high = 1.0
    parts: list[tuple[float, ...]] = []
    for e, t in enumerate(timesteps):
        due = e % cache.unconditional_batch_skip_range == 0
        if cache.is_guidance_distilled or due or not is_in_window(cache.unconditional_batch_timestep_skip_range, t):
            low = high = 1.0
            parts.append(())
            continue
        in_low = is_in_window(cache.low_frequency_weight_update_timestep_range, t)
        in_high = is_in_window(cache.high_frequency_weight_update_timestep_range, t)
        low *= lows[e] if lows else cache.alpha_low_frequency if in_low else 1.0
        high *= highs[e] if highs else cache.alpha_high_frequency if in_high else 1.0
        parts.append((low, high))
    return parts


def evaluation_weights(cache: FasterCache, key: str, evaluations: int) -> tuple[float, ...]:
    """The weight of each evaluation, () where the recipe gives none. Raises RecipeError for a list of another length."""
    given = getattr(cache, key)
    if given is None:
        return ()
    if isinstance(given, float):
        return (given,) * evaluations
    if len(given) != evaluations:
        raise RecipeError(
            f"cache.{key} has {len(given)} weights, but the denoiser is evaluated {evaluations} times; "
            "give one for each evaluation, or one number for all"
        )
    return given


def check_branches(cache: FasterCache, layout: Layout) -> None:
    """ExportError unless there is an unconditional branch, with its difference split by frequency, where one is needed."""
    if cache.is_guidance_distilled:
        return
    if "uncond" not in layout.branches:
        raise ExportError(
            "cache method 'fastercache' skips the unconditional branch of guidance, and this denoiser has one branch only; "
            "set cache.is_guidance_distilled=true to extrapolate its attentions alone"
        )
    if not layout.planes:
        raise ExportError(
            "cache method 'fastercache' splits the difference between the branches by frequency, and this denoiser does not; "
            "an artifact must be exported again with this cache, a family must build it with guided(..., planes=(H, W)), the "
            "last two dimensions of its output, or set cache.is_guidance_distilled=true to extrapolate attentions alone"
        )
