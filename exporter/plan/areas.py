"""The scheduler at each area of a range of sizes: FLUX and SD3 shift their schedule by the number of tokens, and that by the area."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...runtime.sizes.size_range import SizeRange

TablesT = TypeVar("TablesT")


def tabulate_areas(
    sizes: SizeRange | None, default_area: int, tabulate: Callable[[int, int], TablesT]
) -> dict[int, TablesT]:
    """Area -> `tabulate(height, width)` of a size of it, for all but the default size's; none without a range, and where the tables do not
    follow the size. That its smallest and its largest area show: a shift grows from one to the other."""
    if sizes is None:
        return {}
    of_area = {height * width: (height, width) for height in sizes.height.values for width in sizes.width.values}
    if tabulate(*of_area[min(of_area)]) == tabulate(*of_area[max(of_area)]):
        return {}
    return {area: tabulate(*of_area[area]) for area in sorted(of_area) if area != default_area}
