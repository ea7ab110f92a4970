"""The two passes over attention: the operators before and after, and where they must not fire."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.passes.attention_backend import set_attention_backend
from prebake.exporter.passes.attention_dtype import cast_attention
from prebake.exporter.passes.captured_graph import CapturedGraph

SDPA = "scaled_dot_product_attention.default"


class Attention(nn.Module):
    def forward(self, q: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (scaled_dot_product_attention(q, q * 2, q, attn_mask=mask),)


class Doubled(nn.Module):
    def forward(self, q: Tensor) -> tuple[Tensor]:
        return (q * 2,)


def captured(dtype: torch.dtype = torch.float32) -> CapturedGraph:
    q, mask = torch.randn(1, 2, 8, 16), torch.zeros(8, 8)
    return capture_graph("g", Attention(), (q.to(dtype), mask.to(dtype)), ("q", "mask"), ("y",))


def ops(graph: CapturedGraph) -> list[str]:
    """The operators in order; a Python function by its own name."""
    calls = (n.target for n in graph.gm.graph.nodes if n.op == "call_function")
    return [getattr(t, "__name__", str(t)) if "<function" in repr(t) else str(t).removeprefix("aten.") for t in calls]


def test_attention_is_cast_and_its_result_cast_back():
    graph = captured()
    half = cast_attention(graph, torch.bfloat16)
    assert ops(graph) == ["mul.Tensor", SDPA]
    casts = ["_to_copy.default"] * 4  # queries, keys, values and the mask
    assert ops(half) == ["mul.Tensor", *casts, SDPA, "_to_copy.default"]
    y, expected = half.gm(*graph.args)[0], graph.gm(*graph.args)[0]
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits


def test_attention_of_that_dtype_is_not_cast():
    graph = captured(torch.bfloat16)
    assert ops(cast_attention(graph, torch.bfloat16)) == ops(graph) == ["mul.Tensor", SDPA]


def test_attention_becomes_the_call_of_one_kernel():
    graph = captured()
    assert ops(set_attention_backend(graph, "math")) == ["mul.Tensor", "math"]
    assert ops(graph) == ["mul.Tensor", SDPA], "the graph that came in"


def test_a_graph_without_attention_stays_as_it_is():
    graph = capture_graph("g", Doubled(), (torch.ones(2, 3),), ("q",), ("y",))
    assert ops(set_attention_backend(graph, "math")) == ops(cast_attention(graph, torch.bfloat16)) == ["mul.Tensor"]
