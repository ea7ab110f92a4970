"""Dimensions as text and back, what of a range is legal, and the nearest of what is not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from prebake.runtime.sizes.dimension import Dimension, fit_dimension
from prebake.runtime.sizes.size_range import SideRange, SizeRange

RANGE = SizeRange(height=SideRange(min=512, max=1536, step=64), width=SideRange(min=256, max=512, step=128))
TOKENS = "height*width/256+512"


@pytest.mark.parametrize("text", [TOKENS, "height/8", "3*height/16", "2*width+height+4", "7"])
def test_a_dimension_is_its_text(text):
    assert Dimension.parse(str(Dimension.parse(text))) == Dimension.parse(text)


@pytest.mark.parametrize(
    "text", ["", "depth", "height-1", "0*height", "height+height", "height*height", "height/0", "1" * 99]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="expected a sum"):
        Dimension.parse(text)


def test_a_dimension_is_found_from_what_it_is_at_the_ends():
    (h0, h1), (w0, w1) = (512, 1536), (256, 512)
    seen = [512 + h * w // 256 for h in (h0, h1) for w in (w0, w1)]
    assert str(fit_dimension((h0, h1), (w0, w1), seen)) == TOKENS
    assert str(fit_dimension((h0, h1), (w0, w0), [n // 8 for n in (h0, h0, h1, h1)])) == "height/8"
    assert fit_dimension((h0, h1), (w0, w1), [77] * 4) == Dimension.parse("77")


def test_a_dimension_is_whole_or_an_error():
    assert Dimension.parse(TOKENS).at(512, 256) == 1024
    with pytest.raises(ValueError, match="no whole number"):
        Dimension.parse("height/32").at(16, 32)


def test_a_range_has_its_sizes_and_no_others():
    assert (512, 256) in RANGE
    assert (1536, 512) in RANGE
    for size in ((512, 320), (528, 256), (448, 256), (1600, 256), (256, 512)):
        assert size not in RANGE


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ((600, 256), [(576, 256), (640, 256)]),
        ((512, 300), [(512, 256), (512, 384)]),
        ((10, 10), [(512, 256), (576, 256)]),
        ((9999, 9999), [(1536, 512), (1472, 512)]),
    ],
)
def test_the_nearest_two_are_legal(asked, nearest):
    assert RANGE.nearest(*asked) == nearest
    every = sorted((abs(h - asked[0]) + abs(w - asked[1])) for h in RANGE.height.values for w in RANGE.width.values)
    assert [abs(h - asked[0]) + abs(w - asked[1]) for h, w in nearest] == every[:2]


def test_a_size_is_found_by_the_shapes_that_it_has():
    tokens, rows = Dimension.parse(TOKENS), Dimension.parse("height/16")
    assert RANGE.find_size([(tokens, tokens.at(640, 384)), (rows, 40)]) == (640, 384)
    height, width = RANGE.find_size([(tokens, tokens.at(640, 384))]) or (0, 0)
    assert height * width == 640 * 384
    assert RANGE.find_size([(tokens, tokens.at(640, 384) + 1)]) is None
    assert RANGE.find_size([(tokens, tokens.at(640, 384)), (rows, 41)]) is None
    assert RANGE.find_size([(rows, 31)]) is None


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ({"min": 512, "max": 1500, "step": 64}, "nearest are 1472 and 1536"),
        ({"min": 512, "max": 256, "step": 64}, "expected min plus a multiple"),
        ({"min": 1, "max": 1 << 20, "step": 1}, "at most 4096 lengths"),
    ],
)
def test_a_side_that_is_no_range_is_refused(side, said):
    with pytest.raises(ValidationError, match=said):
        SideRange.model_validate(side)
