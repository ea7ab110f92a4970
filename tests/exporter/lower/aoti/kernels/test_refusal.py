"""What the kernels' pass tells of a graph: how often it calls which kernel, and why not where it could."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.lower import w8a8
from prebake.exporter.lower.aoti.kernels.rewrite import insert_kernel_calls
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.quantize import Int8Dynamic
from prebake.runtime.manifest import KernelRefusal

HALF = torch.bfloat16


class Attention(nn.Module):
    def __init__(self, **asked) -> None:
        super().__init__()
        self.asked = asked

    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x * 2, x, **self.asked).contiguous()


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


def called(model: nn.Module, x: Tensor) -> CapturedGraph:
    return insert_kernel_calls(capture_graph("g", model, (x,), ("x",), ("y",)))


def test_what_is_called_is_counted():
    graph = called(Blocks(Attention(), Attention()), torch.randn(1, 2, 9, 16, dtype=HALF))
    assert graph.kernels == {"attention": 2}
    assert graph.refusals == ()


@pytest.mark.parametrize(
    ("asked", "x", "reason"),
    [
        ({}, torch.randn(1, 2, 9, 16), "in float32, not bfloat16"),
        ({"attn_mask": torch.zeros(9, 9, dtype=HALF)}, torch.randn(1, 2, 9, 16, dtype=HALF), "has a mask"),
        ({"is_causal": True}, torch.randn(1, 2, 9, 16, dtype=HALF), "has a causal order"),
        ({}, torch.randn(2, 9, 16, dtype=HALF), "not of four dimensions"),
        ({}, torch.randn(1, 2, 9, 15, dtype=HALF), "heads of 15, an odd width"),
    ],
)
def test_attention_says_why_it_stays(asked, x, reason):
    graph = called(Blocks(Attention(**asked), Attention(**asked)), x)
    assert graph.kernels == {}
    # one entry for both places
    assert graph.refusals == (KernelRefusal(kernel="attention", reason=reason, places=2, first="blocks.0"),)


class Gate(nn.Module):
    """diffusers' GEGLU, and a plain exact GELU with `parts` of 1."""

    def __init__(self, width: int, parts: int, approximate: str = "none") -> None:
        super().__init__()
        self.proj, self.parts, self.approximate = nn.Linear(64, width), parts, approximate

    def forward(self, x: Tensor) -> Tensor:
        if self.parts == 1:
            return gelu(self.proj(x), approximate=self.approximate)
        a, b = self.proj(x).chunk(2, -1)
        return a * gelu(b, approximate=self.approximate)


@pytest.mark.parametrize(
    ("gate", "refused"),
    [
        (Gate(192, 2), []),
        (Gate(80, 2), [("packed_w8a8's GEGLU", "80 columns, no multiple of 64")]),
        (Gate(192, 2, "tanh"), [("packed_w8a8's GEGLU", "by the tangent, not exact")]),
        (Gate(64, 1, "tanh"), []),
        (Gate(64, 1), [("packed_w8a8's GELU", "exact, not by the tangent")]),
    ],
)
def test_an_int8_layer_says_what_behind_it_stays(gate, refused):
    model = Blocks(gate)
    w8a8.replace_layers(model, {"blocks.0.proj"}, Int8Dynamic())
    graph = called(model, torch.randn(2, 21, 64))
    assert graph.kernels == {"packed_w8a8": 1}
    assert [(r.kernel, r.reason) for r in graph.refusals] == refused


def test_a_linear_of_many_rows_says_so():
    graph = called(Blocks(nn.Linear(16, 16)), torch.randn(5, 16))
    assert graph.refusals == (KernelRefusal(kernel="few_rows", reason="more than 4 rows", places=1, first="blocks.0"),)


def test_a_rotary_embedding_of_halves_says_so():
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * x.cos() + torch.cat([-b, a], -1) * x.sin()

    graph = called(Blocks(Halves()), torch.randn(1, 9, 2, 16))
    reason = "pairs that are no neighbours, or turned otherwise"
    assert graph.refusals == (KernelRefusal(kernel="rotary", reason=reason, places=1, first="blocks.0"),)


def test_an_ordinary_sum_is_no_refusal():
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.cos() + (x - 1) * x.sin()

    assert called(Blocks(Sum()), torch.randn(1, 9, 2, 16)).refusals == ()
