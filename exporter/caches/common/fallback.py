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
    from ...plan.sampler import Table


def that_holds(
    cache: Any,
    origin: Source,
    size: calibrations.Size,
    tables: Mapping[int, Table],
    near: Path | None,
    progress: Progress,
) -> Any:
    """The cache; or with a note the mask `cache.otherwise`, where the calibration is of another model or size, or lacks
    the timesteps of one of the `tables` (by their number of steps), and then for all of them; or none, where that mask
    computes everything at all of these numbers of steps.

    Raises RecipeError where the calibration is not there.
    """
    if not isinstance(cache, Auto) or cache.otherwise is None or cache.calibration is None:
        return cache
    made = calibrations.read(calibrations.find(cache.calibration, near))
    reason = misfit(made, cache, origin, size, tables)
    if not reason:
        return cache
    mask = cache.fallback()
    computes = all(all(mask.expand(n)) for n in tables)
    instead = f"and mask {cache.otherwise} skips nothing" if computes else f"so mask {cache.otherwise} is used"
    progress.note(
        f"cache: {cache.calibration} {reason}, {instead} {'at' if computes else 'for'} {listed(tables)} steps; "
        f"`{calibrations.COMMAND}` finds a plan for a model and its steps"
    )
    return NoCache() if computes else mask


def misfit(made: Calibration, cache: Auto, origin: Source, size: calibrations.Size, tables: Mapping[int, Table]) -> str:
    """Why the calibration does not hold, or ''."""
    if made.sha256 != origin.sha256:
        return f"is of the model {made.model!r}, and this is another one"
    if (made.height, made.width) not in ((None, None), (size.height, size.width)):
        return f"is of pictures of {made.height} x {made.width}, and these are of {size.height} x {size.width}"
    others = [n for n, table in tables.items() if not made_at(made, cache, table)]
    if not others:
        return ""
    return f"is for the timesteps of {made.steps} steps of {made.scheduler}, and those of {listed(others)} steps here are others"


def made_at(made: Calibration, cache: Auto, table: Table) -> bool:
    """Whether the table has the calibration's scheduler, whose updates weights are fitted to, and its timesteps."""
    try:
        calibrations.required(made, cache, table.timesteps, "timesteps")
    except ExportError:
        return False
    return table.scheduler == made.scheduler


def listed(steps: Iterable[int]) -> str:
    return " and ".join(map(str, steps))
