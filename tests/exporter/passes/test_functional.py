"""In-place operators: rewritten where nobody else can see the memory, refused elsewhere."""

from __future__ import annotations

import pytest
import torch

from prebake.exporter.passes.functionalize import functionalize_graph, is_mutating


def traced(f, *args):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return (f(*args),)

    return torch.export.export(Module(), args, strict=False).module()


def ops(gm) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]


def arithmetic(a, b):
    c = a @ b
    c.sub_(b)
    y = (c * 2).reshape(-1)
    y += 1
    return y * c.sum()


def test_arithmetic_on_fresh_results_becomes_functional():
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    gm = traced(arithmetic, a, b)
    assert ops(gm) == [
        "matmul.default",
        "sub_.Tensor",
        "mul.Tensor",
        "reshape.default",
        "add_.Tensor",
        "sum.default",
        "mul.Tensor",
    ]
    assert functionalize_graph(gm)
    assert ops(gm) == [
        "matmul.default",
        "sub.Tensor",
        "mul.Tensor",
        "reshape.default",
        "add.Tensor",
        "sum.default",
        "mul.Tensor",
    ]
    assert torch.equal(gm(a, b)[0], arithmetic(a, b))


def writes_through_a_view(a):
    c = a + 1
    c[0] += 1  # the base is read afterwards
    return c * 2


def writes_to_an_input(a):
    a += 1
    return a * 2


def a_view_made_before_is_read_after(a):
    c = a + 1
    row = c[0]
    c += 1
    return row * 2


@pytest.mark.parametrize("f", [writes_through_a_view, writes_to_an_input, a_view_made_before_is_read_after])
def test_what_others_can_see_is_left_alone(f):
    gm = traced(f, torch.randn(3, 3))
    before = ops(gm)
    assert any(is_mutating(n) for n in gm.graph.nodes if n.op == "call_function")
    assert not functionalize_graph(gm)
    assert ops(gm) == before
