"""The size that a call asks for, against those that the artifact has: listed ones, or a range."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RequestError
from ..sizes.size_range import SizeRange, nearest_sizes


def refuse_other_size(
    asked: tuple[int, int], sizes: Sequence[tuple[int, int]], legal: SizeRange | None, kind: str
) -> None:
    """Raises RequestError with the nearest two where the (height, width) is neither one of `sizes` nor in the range `legal`; `kind` is what is
    made, `images` or `frames`."""
    if asked in (sizes if legal is None else legal):
        return
    if legal is not None:
        nearest, said = legal.nearest(*asked), f"of {legal}; the nearest are "
    elif len(sizes) == 1:
        nearest, said = sizes, "of "
    else:
        nearest, said = nearest_sizes(asked, sizes), f"of {len(sizes)} sizes, the nearest are "
    named = " and ".join(f"height {height}, width {width}" for height, width in nearest)
    only = " only" if len(nearest) == 1 else ""
    raise RequestError(
        f"height={asked[0]}, width={asked[1]}: the artifact makes {kind} {said}{named}{only}; export again for another size"
    )
