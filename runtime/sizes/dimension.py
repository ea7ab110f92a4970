"""A dimension of a tensor as a function of the picture's size: `height*width/256+512`.

The exporter writes it beside the number that it is at the default size, and the reader holds every call against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator, Field

NUMBER = r"[1-9]\d{0,11}"
TERM = re.compile(rf"(?:({NUMBER})\*)?(height\*width|height|width)(?:/({NUMBER}))?|({NUMBER})")
FACTORS = ("", "height", "width", "height*width")
MAX_TEXT = 128


@dataclass(frozen=True)
class Dimension:
    """`constant + height H + width W + area H W`, of a picture of H x W pixels."""

    constant: Fraction = Fraction(0)
    height: Fraction = Fraction(0)
    width: Fraction = Fraction(0)
    area: Fraction = Fraction(0)

    @classmethod
    def parse(cls, text: str) -> Dimension:
        """The dimension of that text. Raises ValueError for one that is none."""
        found: dict[str, Fraction] = {}
        for term in text.split("+"):
            match = TERM.fullmatch(term)
            factor = (match[2] or "") if match else ""
            if match is None or factor in found:
                raise ValueError(f"expected a sum such as 'height*width/256+512', got {text!r}")
            found[factor] = Fraction(int(match[1] or match[4] or 1), int(match[3] or 1))
        return cls(*(found.get(factor, Fraction(0)) for factor in FACTORS))

    def __str__(self) -> str:
        terms = []
        for factor, share in zip((*FACTORS[1:], ""), (self.height, self.width, self.area, self.constant), strict=True):
            if share:
                times = f"{share.numerator}*" if factor and share.numerator != 1 else ""
                over = f"/{share.denominator}" if share.denominator != 1 else ""
                terms.append(f"{times}{factor}{over}" if factor else str(share))
        return "+".join(terms) or "0"

    @property
    def is_constant(self) -> bool:
        """Whether it is the same at every size."""
        return not (self.height or self.width or self.area)

    def at(self, height: int, width: int) -> int:
        """The number that it is at that size. Raises ValueError where that is no whole number."""
        value = self.constant + self.height * height + self.width * width + self.area * height * width
        if value.denominator != 1:
            raise ValueError(f"{self} is no whole number at a height of {height} and a width of {width}")
        return int(value)


@lru_cache(maxsize=1024)
def parse_dimension(text: str) -> Dimension:
    """`Dimension.parse`, remembered: the graphs of an artifact say few different ones."""
    return Dimension.parse(text)


def check_dimension(text: str) -> str:
    """The text. Raises ValueError for one that is no dimension, or the same at every size."""
    if parse_dimension(text).is_constant:
        raise ValueError(f"expected a dimension that follows height or width, got {text!r}")
    return text


DimensionText = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(check_dimension)]


def fit_dimension(heights: tuple[int, int], widths: tuple[int, int], seen: Iterable[int]) -> Dimension:
    """The dimension that was `seen` at the sizes (h0, w0), (h0, w1), (h1, w0), (h1, w1). Of two equal sides it is taken not to
    depend on that side."""
    (h0, h1), (w0, w1) = heights, widths
    n00, n01, n10, n11 = map(Fraction, seen)
    high, wide = h1 - h0, w1 - w0
    area = (n11 - n10 - n01 + n00) / (high * wide) if high and wide else Fraction(0)
    height = (n10 - n00) / high - area * w0 if high else Fraction(0)
    width = (n01 - n00) / wide - area * h0 if wide else Fraction(0)
    return Dimension(n00 - height * h0 - width * w0 - area * h0 * w0, height, width, area)
