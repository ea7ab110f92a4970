"""Fallback: what an export and `prebake plan` do where a plan that was found for one model and its steps does not hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....runtime.errors import ExportError
from ....runtime.manifest import Source
from ...progress import Progress
from .. import Auto, NoCache
from . import calibration as calibrations
from .calibration import Calibration

if TYPE_CHECKING:
    from ...plan.sampler import SchedulerTable


def settle_cache(
    cache: Any,
    origin: Source,
    size: calibrations.PictureSize,
    tables: Mapping[int, SchedulerTable],
    near: Path | None,
    progress: Progress,
) -> tuple[Any, Calibration | None]:
    """The cache and the calibration that it names; or with a note the mask `cache.otherwise`, where the calibration is of
    another model or size, or lacks the timesteps of one of the `tables` (by their number of steps), and then for all of
    them; or none, where that mask computes everything at all of these numbers of steps.

    Raises RecipeError where the calibration is not there, or does not hold and nothing stands in for it.
    """
    calibration = calibrations.load_calibration(cache, near)
    if calibration is None:
        return cache, None
    if not isinstance(cache, Auto) or cache.otherwise is None:
        calibrations.check_calibration(calibration, str(cache.calibration), origin, size)
        return cache, calibration
    reason = explain_misfit(calibration, cache, origin, size, tables)
    if not reason:
        return cache, calibration
    mask = cache.fallback()
    computes = all(all(mask.expand(n)) for n in tables)
    instead = f"and mask {cache.otherwise} skips nothing" if computes else f"so mask {cache.otherwise} is used"
    progress.note(
        f"cache: {cache.calibration} {reason}, {instead} {'at' if computes else 'for'} {list_steps(tables)} steps; "
        f"`{calibrations.CALIBRATE_COMMAND}` finds a plan for a model and its steps"
    )
    return NoCache() if computes else mask, None


def explain_misfit(
    made: Calibration, cache: Auto, origin: Source, size: calibrations.PictureSize, tables: Mapping[int, SchedulerTable]
) -> str:
    """Why the calibration does not hold, or ''."""
    if made.sha256 != origin.sha256:
        return f"is of the model {made.model!r}, and this is another one"
    if (made.height, made.width) not in ((None, None), (size.height, size.width)):
        return f"is of pictures of {made.height} x {made.width}, and these are of {size.height} x {size.width}"
    others = [n for n, table in tables.items() if not is_calibrated_at(made, cache, table)]
    if not others:
        return ""
    return f"is for the timesteps of {made.steps} steps of {made.scheduler}, and those of {list_steps(others)} steps here are others"


def is_calibrated_at(made: Calibration, cache: Auto, table: SchedulerTable) -> bool:
    """Whether the table has the calibration's scheduler, whose updates weights are fitted to, and its timesteps."""
    try:
        calibrations.require_calibration(made, cache, table.timesteps, "timesteps")
    except ExportError:
        return False
    return table.scheduler == made.scheduler


def list_steps(steps: Iterable[int]) -> str:
    return " and ".join(map(str, steps))
