"""A range of sizes: what of it is legal, and which legal sizes are nearest to one that is not.

Compiled code enforces nothing: a graph runs at any size, and what it makes outside of its range means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

from pydantic import BaseModel, ConfigDict, model_validator

from ..bounds import Pixels
from .dimension import Dimension

MAX_SIDES = 4096
"""Lengths that a side may have: from 16 to 65,536 pixels by 16."""


class SideRange(BaseModel):
    """Lengths of one side in pixels, from `min` to `max` by `step`; `min` alone where both are equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    min: Pixels
    max: Pixels
    step: Pixels

    @model_validator(mode="after")
    def _ends_with_a_step(self) -> SideRange:
        if self.max < self.min or (self.max - self.min) % self.step:
            below = max(self.min, self.max - (self.max - self.min) % self.step)
            raise ValueError(
                f"max: expected min plus a multiple of step, from {self.min} by {self.step}, got {self.max}; the nearest are "
                f"{below} and {below + self.step}"
            )
        if len(self.values) > MAX_SIDES:
            raise ValueError(
                f"step: expected at most {MAX_SIDES} lengths from {self.min} to {self.max}, got {len(self.values)}"
            )
        return self

    @classmethod
    def of_length(cls, length: int) -> SideRange:
        """One length alone."""
        return cls(min=length, max=length, step=1)

    @property
    def is_fixed(self) -> bool:
        """Whether there is one length alone."""
        return self.min == self.max

    @property
    def values(self) -> range:
        """All lengths."""
        return range(self.min, self.max + 1, self.step)

    @property
    def unit(self) -> int:
        """What every length is a multiple of."""
        return self.min if self.is_fixed else math.gcd(self.min, self.step)

    def nearest(self, length: int) -> tuple[int, ...]:
        """The two legal lengths around this one, or the last two; the nearest first."""
        below = min(max((length - self.min) // self.step, 0), len(self.values) - 1)
        around = {self.values[max(0, i)] for i in (below - 1, below, below + 1) if i < len(self.values)}
        return tuple(sorted(around, key=lambda n: (abs(n - length), n)))[:2]

    def __str__(self) -> str:
        return str(self.min) if self.is_fixed else f"{self.min} to {self.max} by {self.step}"


class SizeRange(BaseModel):
    """Every legal height with every legal width, in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    height: SideRange
    width: SideRange

    def __contains__(self, size: object) -> bool:
        return isinstance(size, tuple) and size[0] in self.height.values and size[1] in self.width.values

    def nearest(self, height: int, width: int) -> list[tuple[int, int]]:
        """The two legal (height, width) that differ the least in both sides together."""
        return nearest_sizes((height, width), list(product(self.height.nearest(height), self.width.nearest(width))))

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """(height, width) at the ends of both sides: h0 w0, h0 w1, h1 w0, h1 w1; some are equal where a side is fixed."""
        return tuple(product((self.height.min, self.height.max), (self.width.min, self.width.max)))

    @property
    def areas(self) -> frozenset[int]:
        """The areas of all sizes, in square pixels."""
        return frozenset(height * width for height in self.height.values for width in self.width.values)

    def find_size(self, dimensions: Sequence[tuple[Dimension, int]]) -> tuple[int, int] | None:
        """A legal size at which every dimension is the number beside it; None where there is none. Several sizes may have equal
        tensors, as 2 x 8 and 4 x 4 patches have."""
        return next(self._sizes_with(dimensions), None)

    def _sizes_with(self, dimensions: Sequence[tuple[Dimension, int]]) -> Iterator[tuple[int, int]]:
        for height in self.height.values:
            left = [(d.constant + d.height * height, d.width + d.area * height, n) for d, n in dimensions]
            if any(not by_width and constant != n for constant, by_width, n in left):
                continue
            widths = {(n - constant) / by_width for constant, by_width, n in left if by_width}
            if not widths:
                yield height, self.width.min
            elif len(widths) == 1 and (width := widths.pop()).denominator == 1 and int(width) in self.width.values:
                yield height, int(width)

    def __str__(self) -> str:
        return f"height {self.height}, width {self.width}"


def nearest_sizes(asked: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The two (height, width) that differ the least in both sides together."""
    return sorted(sizes, key=lambda size: abs(size[0] - asked[0]) + abs(size[1] - asked[1]))[:2]
