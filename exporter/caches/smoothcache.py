"""SmoothCache (Liu et al. 2024, arXiv:2411.10510): outputs of one type of module are reused while they stay close.

A calibration measured how far the outputs of each component lie from those j evaluations later. The schedule is read off
in one pass: from a computed evaluation i, as many of the following as possible reuse its output, j at most, where the
error over that distance is at most the threshold (Roblox/SmoothCache, `calibration/calibration_helper.py`). The original
mixes the branches of guidance in one table; here each branch has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from ...runtime.errors import ExportError, RecipeError
from ..sites.layout import Layout, Place
from .common.calibration import CALIBRATE_COMMAND, CalibratedCache, Calibration, require_calibration
from .common.schedule import Decision, Schedule, Trajectory


class SmoothCache(CalibratedCache):
    """Outputs of attention and feed-forward are reused where the calibration's error is at most `calibration_threshold`.

    At most `calibration_lookahead` evaluations in a row reuse one output. `components_to_wrap` are the modules' own names
    ("attn1", "ff"); left out, they are all that the model has. With `per_block` every module has a schedule of its own,
    else those of one name share it. `schedule_length` is the plan's own number of evaluations; a value given must agree
    with it. arXiv:2411.10510.
    """

    method: Literal["smoothcache"] = "smoothcache"
    calibration_lookahead: int = Field(default=3, ge=1)
    calibration_threshold: float = Field(default=0.0, ge=0)
    components_to_wrap: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    per_block: bool = False
    schedule_length: int | None = Field(default=None, ge=1)


def leaf_name(place: Place) -> str:
    """The module's own name: the last part that is not an index."""
    return next((part for part in reversed(place.name.split(".")) if not part.isdigit()), place.name)


def find_components(layout: Layout, *, per_block: bool = False) -> dict[str, tuple[Place, ...]]:
    """Name -> attentions and feed-forwards: `cond/attn1` for all of that name in the branch, or one for each module."""
    found: dict[str, tuple[Place, ...]] = {}
    for place in layout.of("attention", "cross_attention", "feed_forward"):
        joint = f"{place.branch}/{leaf_name(place)}" if place.branch else leaf_name(place)
        name = place.site if per_block else joint
        found[name] = (*found.get(name, ()), place)
    return found


def choose_components(cache: SmoothCache, layout: Layout) -> dict[str, tuple[Place, ...]]:
    """The components that the recipe names. Raises ExportError for a name that no module has."""
    names = list(dict.fromkeys(leaf_name(p) for group in find_components(layout).values() for p in group))
    asked = names if cache.components_to_wrap is None else cache.components_to_wrap
    if missing := [name for name in asked if name not in names] or ([] if names else ["attn1"]):
        raise ExportError(
            f"cache.components_to_wrap: no attention or feed-forward of the model is called {', '.join(map(repr, missing))}; "
            f"it has {', '.join(names) or 'none'}"
        )
    found = find_components(layout, per_block=cache.per_block)
    return {name: places for name, places in found.items() if leaf_name(places[0]) in asked}


def schedule(cache: SmoothCache, layout: Layout, trajectory: Trajectory, calibration: Calibration | None) -> Schedule:
    """Each component's own steps. Raises ExportError where the calibration lacks its errors."""
    count = len(trajectory.timesteps)
    if cache.schedule_length not in (None, count):
        raise RecipeError(
            f"cache.schedule_length = {cache.schedule_length}, and this plan has {count} evaluations; leave the key out"
        )
    groups = choose_components(cache, layout)
    calibration = require_calibration(calibration, cache, trajectory.timesteps, "errors")
    computes = {name: scan_errors(cache, find_errors(cache, calibration.errors, name)) for name in groups}
    marks = {name: tuple(p.mark() for p in places) for name, places in groups.items()}
    decisions = (
        Decision.reuse(*(m for name in groups if not computes[name][e] for m in marks[name])) for e in range(count)
    )
    return Schedule(tuple(m for group in marks.values() for m in group), tuple(decisions))


def find_errors(
    cache: SmoothCache, errors: Mapping[str, Sequence[Sequence[float]]], name: str
) -> Sequence[Sequence[float]]:
    """The component's errors. Raises ExportError where there are none, or none as far apart as the lookahead asks."""
    reach = max(map(len, errors.get(name, ())), default=0)
    if reach < min(cache.calibration_lookahead, len(errors.get(name, ())) - 1) or name not in errors:
        raise ExportError(
            f"cache.calibration: its errors of {name!r} reach {reach} evaluations back, and calibration_lookahead is "
            f"{cache.calibration_lookahead}; run `{CALIBRATE_COMMAND}` again with this recipe"
        )
    return errors[name]


def scan_errors(cache: SmoothCache, errors: Sequence[Sequence[float]]) -> tuple[bool, ...]:
    """Whether each evaluation computes: from i on, the longest run of reuse that the threshold allows; first and last
    always compute."""
    count = len(errors)
    computes = [True] * count
    i = 0
    while i < count:
        reach = range(min(cache.calibration_lookahead, count - 1 - i), 0, -1)
        skipped = next((j for j in reach if errors[i + j][j - 1] <= cache.calibration_threshold), 0)
        computes[i + 1 : i + 1 + skipped] = [False] * skipped
        i += skipped + 1
    computes[-1:] = [True] * bool(count)
    return tuple(computes)
