"""Graphs of a range: height and width vary by themselves, and what would be wrong at another size is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.capture.ranges import find_output_axes
from prebake.exporter.export_cache.fingerprint import graph_fingerprint
from prebake.runtime.errors import ExportError
from prebake.runtime.sizes.dimension import Dimension
from prebake.runtime.sizes.size_range import SideRange, SizeRange

SIZES = SizeRange(height=SideRange(min=32, max=96, step=16), width=SideRange(min=32, max=64, step=16))
LATENTS = {2: Dimension.parse("height/8"), 3: Dimension.parse("width/8")}


class Halved(nn.Module):
    """A convolution that halves both sides, and its pixels as tokens behind `text`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = self.conv(x)
        return half, torch.cat((text, half.flatten(2).transpose(1, 2)), 1)


class Thirds(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x[..., : x.shape[-1] // 3].contiguous(),)


class SquareOnly(nn.Module):
    """What is traced at a square of 8 x 8 is another graph than at other sizes."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x + 1 if x.shape[2] == 8 else x - 1,)


def capture(module: nn.Module, args, names, outputs, axes, sizes=SIZES):
    of_inputs = [axes.get(name, {}) for name in names]
    found = find_output_axes("g", module, args, of_inputs, outputs, sizes)
    return capture_graph("g", module.eval(), args, names, outputs, sizes, {**axes, **found})


@pytest.fixture(scope="module")
def halved():
    module = Halved()
    return module, capture(
        module, (torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)), ("x", "text"), ("half", "tokens"), {"x": LATENTS}
    )


def test_a_square_example_is_for_every_shape(halved):
    module, graph = halved
    assert [spec.axes for spec in graph.inputs] == [{2: "height/8", 3: "width/8"}, {}]
    assert [spec.axes for spec in graph.outputs] == [{2: "height/16", 3: "width/16"}, {1: "height*width/256+3"}]
    assert [spec.shape for spec in graph.outputs] == [(1, 8, 4, 4), (1, 19, 8)]
    for high, wide in ((4, 8), (12, 4), (6, 6)):
        given = torch.randn(1, 4, high, wide), torch.randn(1, 3, 8)
        for got, expected in zip(graph.gm(*given), module(*given), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_tokens_of_stored_values_follow_both_sides():
    """A dimension that no name of torch.export's can say is found out by tracing."""

    class Added(nn.Module):
        def forward(self, x: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return ((x.flatten(2).transpose(1, 2) + stored).contiguous(),)

    axes = {"x": LATENTS, "stored": {1: Dimension.parse("height*width/64")}}
    graph = capture(Added(), (torch.randn(1, 4, 8, 8), torch.randn(1, 64, 4)), ("x", "stored"), ("y",), axes)
    assert graph.outputs[0].axes == {1: "height*width/64"}
    assert graph.gm(torch.ones(1, 4, 4, 8), torch.ones(1, 32, 4))[0].sum() == 2 * 32 * 4


def test_other_ranges_are_other_code(halved):
    """The compiler makes use of how large a dimension can be."""
    graph = halved[1]
    wider = SizeRange(height=SideRange(min=32, max=960, step=16), width=SIZES.width)
    assert graph_fingerprint(graph, "", {}) != graph_fingerprint(replace(graph, sizes=wider), "", {})
    assert graph_fingerprint(graph, "", {}) == graph_fingerprint(graph, "", {})


def test_what_follows_the_size_in_no_line_is_refused():
    with pytest.raises(ExportError, match=r"'y' follows the size in no line.*shapes\.sizes"):
        capture(Thirds(), (torch.randn(1, 4, 8, 8),), ("x",), ("y",), {"x": LATENTS})


def test_a_graph_that_is_for_one_size_is_refused():
    with pytest.raises(ExportError, match=r"graph 'g': .*shapes\.sizes"):
        capture(SquareOnly(), (torch.randn(1, 4, 8, 8),), ("x",), ("y",), {"x": LATENTS})


def test_a_range_begins_at_two_units():
    sizes = SizeRange(height=SideRange(min=16, max=96, step=16), width=SIZES.width)
    with pytest.raises(ExportError, match=r"shapes\.height\.min: expected at least 32"):
        capture(
            Halved(), (torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)), ("x", "text"), ("a", "b"), {"x": LATENTS}, sizes
        )
