"""ONNX's passes, each by its operators before and after, and where it must not fire."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.lower.onnx.rewrite import copy_shared_outputs, list_passes, transpose_linears, unfold_operators
from prebake.exporter.passes.captured_graph import CapturedGraph, run_passes
from prebake.exporter.passes.derived_weights import DerivedWeights
from prebake.exporter.passes.prune import prune_dead_code

X = torch.arange(12.0).reshape(2, 6)


def captured(f, outputs: int = 1) -> CapturedGraph:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return f(x)

    return capture_graph("g", Module(), (X,), ("x",), tuple(f"y{i}" for i in range(outputs)))


def ops(graph: CapturedGraph) -> list[str]:
    targets = (n.target for n in graph.gm.graph.nodes if n.op == "call_function")
    return [str(t).removeprefix("aten.") if "built-in" not in str(t) else "getitem" for t in targets]


CASES = {
    "split": (
        lambda x: (torch.add(*x.chunk(2, -1)),),
        ["chunk.default", "getitem", "getitem", "add.Tensor"],
        ["slice.Tensor", "slice.Tensor", "add.Tensor"],
    ),
    "unbind": (
        lambda x: (torch.add(*x.unbind(0)),),
        ["unbind.int", "getitem", "getitem", "add.Tensor"],
        ["select.int", "select.int", "add.Tensor"],
    ),
    "cat of two dtypes": (
        lambda x: (torch.cat([x.half(), x], -1),),
        ["to.dtype", "cat.default"],
        ["_to_copy.default", "_to_copy.default", "cat.default"],
    ),
    "cat of one dtype": (lambda x: (torch.cat([x, x], -1),), ["cat.default"], ["cat.default"]),
    "flatten": (lambda x: (x.flatten() * 2,), ["flatten.using_ints", "mul.Tensor"], ["reshape.default", "mul.Tensor"]),
    "squeeze of what is long": (lambda x: (x.squeeze(0) * 2,), ["squeeze.dim", "mul.Tensor"], ["mul.Tensor"]),
    "squeeze of what is not": (
        lambda x: (x[None].squeeze(0) * 2,),
        ["unsqueeze.default", "squeeze.dim", "mul.Tensor"],
        ["unsqueeze.default", "squeeze.dim", "mul.Tensor"],
    ),
    "dropout": (
        lambda x: (torch.dropout(x, 0.5, False) * 2,),
        ["dropout.default", "mul.Tensor"],
        ["mul.Tensor"],
    ),
    "other operators": (lambda x: (torch.relu(x) @ x.t(),), ["relu.default", "t.default", "matmul.default"], None),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_are_unfolded(case):
    f, before, after = CASES[case]
    graph = captured(f)
    done = run_passes(graph, (unfold_operators, prune_dead_code))
    assert (ops(graph), ops(done)) == (before, before if after is None else after)
    torch.testing.assert_close(done.gm(X)[0], graph.gm(X)[0], rtol=0, atol=0)


def test_a_linear_of_a_stored_weight_becomes_a_product_and_a_sum():
    graph = capture_graph("g", nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2, bias=False)), (X,), ("x",), ("y",))
    turn = lambda gm: transpose_linears(gm, DerivedWeights())  # noqa: E731
    done = run_passes(graph, (turn, prune_dead_code))
    assert ops(graph) == ["linear.default", "linear.default"]
    assert ops(done) == ["matmul.default", "add.Tensor", "matmul.default"]
    assert done.constants().keys() == {"0.weight_t", "0.bias", "1.weight_t"}
    torch.testing.assert_close(done.gm(X)[0], graph.gm(X)[0])


def test_a_linear_of_a_computed_weight_stays_one():
    graph = captured(lambda x: (nn.functional.linear(x, x * 2),))
    done = run_passes(graph, list_passes())
    assert ops(graph) == ops(done) == ["mul.Tensor", "linear.default"]


def test_outputs_that_are_one_value_become_copies():
    graph = captured(lambda x: (x * 2, x), outputs=2)
    done = run_passes(graph, (copy_shared_outputs,))
    assert (ops(graph), ops(done)) == (["mul.Tensor"], ["mul.Tensor", "clone.default"])
    alone = captured(lambda x: (x * 2, x + 1), outputs=2)
    assert ops(run_passes(alone, (copy_shared_outputs,))) == ops(alone) == ["mul.Tensor", "add.Tensor"]
