"""MagCache (Ma et al. 2025, arXiv:2506.09045), exactly as diffusers decides it: from measured ratios, with no tensor.

The residual of all blocks together changes its size by a known ratio from step to step. After the retained first steps
the ratios since the last computed step are multiplied, their distances from 1 are added up, and while the sum stays within
`threshold` the last residual is added again (diffusers hooks/mag_cache.py, 0.42.1). Sums and products are float32, as
there, so that a sum which meets the threshold exactly is decided alike. Text states pass through unchanged.
Each branch of guidance follows its own ratios; diffusers gives all of them one list.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ...runtime.errors import ExportError, RecipeError
from ..sites.layout import Layout
from ..sites.marks import Mark
from ..tables import ConflictError
from .common.calibration import CALIBRATE_COMMAND, CalibratedCache, Calibration
from .common.schedule import Decision, Schedule, Trajectory


def _check_ratios(ratios: Any) -> Any:
    """The value itself; ValueError, in one sentence instead of pydantic's one for each type, where it can be neither."""
    listed = isinstance(ratios, list | tuple) and ratios and all(map(_is_number, ratios))
    if not (listed or ratios in (None, "flux")):
        raise ValueError(f'expected "flux" or a list of numbers, such as [1.0, 1.05, 0.98], got {ratios!r}')
    return ratios


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


MagRatios = Annotated[
    Annotated[tuple[float, ...], Field(strict=False)] | Literal["flux"] | None, BeforeValidator(_check_ratios)
]


class MagCache(CalibratedCache):
    """The blocks' residual is reused while its size is expected to stay the same; names of diffusers' `MagCacheConfig`.

    At most `max_skip_steps` evaluations in a row reuse it, and none of the first `retention_ratio` of them. `mag_ratios`
    is one ratio a step (another number of them is interpolated), "flux" for the ones that diffusers ships for FLUX, or
    left out: then they are taken from `calibration`, for each branch. `num_inference_steps` is the plan's own number of
    evaluations; a value given must agree with it. arXiv:2506.09045.
    """

    method: Literal["magcache"] = "magcache"
    threshold: float = Field(default=0.06, ge=0)
    max_skip_steps: int = Field(default=3, ge=1)
    retention_ratio: float = Field(default=0.2, ge=0, le=1)
    num_inference_steps: int | None = Field(default=None, ge=1)
    mag_ratios: MagRatios = None

    @model_validator(mode="after")
    def _has_one_source(self) -> MagCache:
        if self.mag_ratios is not None and self.calibration is not None:
            raise ConflictError(
                (
                    ("mag_ratios", "calibration"),
                    f"mag_ratios and calibration = {self.calibration!r} both say what the ratios are; leave one of them out",
                )
            )
        return self


def schedule(cache: MagCache, layout: Layout, trajectory: Trajectory, calibration: Calibration | None) -> Schedule:
    """One site a branch, the residual of all its blocks. Raises ExportError without blocks or without ratios."""
    steps = len(trajectory.timesteps)
    if cache.num_inference_steps not in (None, steps):
        raise RecipeError(
            f"cache.num_inference_steps = {cache.num_inference_steps}, and this plan has {steps} evaluations; leave the key out"
        )
    marks, computes = [], []
    for branch in layout.branches:
        marks.append(mark_residual(layout, branch))
        computes.append(scan_ratios(cache, interpolate_ratios(find_ratios(cache, calibration, branch), steps)))
    return Schedule(
        tuple(marks),
        tuple(Decision.reuse(*(m for m, c in zip(marks, computes, strict=True) if not c[e])) for e in range(steps)),
    )


def mark_residual(layout: Layout, branch: str) -> Mark:
    """The site of what all blocks add to the latents' tokens; what they add to the text's is not kept."""
    count = len(layout.blocks(branch))
    if not count:
        raise ExportError(
            "cache.method 'magcache' needs a stack of transformer blocks, and this model (a UNet, perhaps) has none; "
            "take method 'deepcache' or 'mask' with site = \"output\""
        )
    mark = layout.residual(branch, 0, count)
    return (
        replace(mark, stored_streams=(mark.streams.index("hidden_states"),))
        if "hidden_states" in mark.streams
        else mark
    )


def find_ratios(cache: MagCache, calibration: Calibration | None, branch: str) -> Sequence[float]:
    """The recipe's ratios, else the calibration's for this branch."""
    if cache.mag_ratios == "flux":
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        return FLUX_MAG_RATIOS.tolist()
    if cache.mag_ratios:
        return cache.mag_ratios
    measured = calibration.magnitudes if calibration else {}
    if not measured.get(branch):
        which = f" for branch {branch!r}" if branch else ""
        raise ExportError(
            f"cache.method 'magcache' has no ratios{which}; run `{CALIBRATE_COMMAND}`, and name the file that it writes in "
            'cache.calibration, or give cache.mag_ratios (a list, or "flux")'
        )
    return measured[branch]


def interpolate_ratios(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """`steps` of the ratios, nearest neighbours, halves to even, in float32 as diffusers' `nearest_interp` computes it."""
    if len(ratios) == steps:
        return tuple(ratios)
    if steps == 1:
        return (ratios[-1],)
    scale = round_to_float32((len(ratios) - 1) / (steps - 1))
    return tuple(ratios[round(round_to_float32(i * scale))] for i in range(steps))


def scan_ratios(cache: MagCache, ratios: Sequence[float]) -> tuple[bool, ...]:
    """Whether each evaluation computes, from one ratio for each."""
    retained = int(cache.retention_ratio * len(ratios) + 0.5)
    computes = []
    ratio, error, skipped = 1.0, 0.0, 0
    for e, r in enumerate(ratios):
        if e >= retained:
            ratio = round_to_float32(ratio * round_to_float32(r))
            error = round_to_float32(error + abs(round_to_float32(1.0 - ratio)))
            skipped += 1
        reuses = (
            e >= retained and e > 0 and error <= round_to_float32(cache.threshold) and skipped <= cache.max_skip_steps
        )
        if not reuses:
            ratio, error, skipped = 1.0, 0.0, 0
        computes.append(not reuses)
    return tuple(computes)


def round_to_float32(x: float) -> float:
    """x rounded to float32; of a sum, difference or product of two float32 this is the float32 result."""
    return c_float(x).value
