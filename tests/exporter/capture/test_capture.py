"""Capture: a module becomes a pruned graph with its contract, or the error says which graph and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.runtime.errors import ExportError


class Function(nn.Module):
    """A module made of a function and of constants held as buffers."""

    def __init__(self, f, **constants) -> None:
        super().__init__()
        self.f = f
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *args):
        return self.f(self, *args)


def captured(f, *args, outputs=("y",), **constants):
    return capture_graph("g", Function(f, **constants), args, tuple(f"x{i}" for i in range(len(args))), outputs)


def test_the_contract_lists_inputs_and_outputs_in_order():
    got = captured(
        lambda m, a, b: (a.sum(), (a @ b).to(torch.bfloat16)),
        torch.ones(2, 3),
        torch.ones(3, 4),
        outputs=("total", "product"),
    )
    assert [(s.name, s.shape, s.dtype) for s in got.inputs] == [("x0", (2, 3), "float32"), ("x1", (3, 4), "float32")]
    assert [(s.name, s.shape, s.dtype) for s in got.outputs] == [
        ("total", (), "float32"),
        ("product", (2, 4), "bfloat16"),
    ]


def test_live_inputs_leave_out_what_the_graph_ignores():
    got = captured(lambda m, a, b: (b * 2,), torch.ones(2), torch.ones(2))
    assert [s.name for s in got.inputs] == ["x0", "x1"]
    assert [s.name for s in got.live_inputs()] == ["x1"]


def test_constants_are_those_that_the_graph_reads():
    got = captured(lambda m, a: (a * m.used,), torch.ones(2), used=torch.full((2,), 3.0), unused=torch.ones(5))
    assert {name: t.tolist() for name, t in got.constants().items()} == {"used": [3.0, 3.0]}


def test_a_tensor_written_as_a_literal_is_a_constant_too():
    got = captured(lambda m, a: (a * torch.tensor([2.0, 5.0]),), torch.ones(2))
    read = {str(n.target) for n in got.gm.graph.nodes if n.op == "get_attr"}
    assert set(got.constants()) == read
    assert got.gm(torch.ones(2))[0].tolist() == [2.0, 5.0]


def test_two_names_of_one_tied_tensor_are_both_bound_or_are_one():
    tied = torch.full((2,), 3.0)
    module = Function(lambda m, a: (a * m.first + m.second,))
    module.first = module.second = nn.Parameter(tied)
    got = capture_graph("g", module, (torch.ones(2),), ("x",), ("y",))
    read = {str(n.target) for n in got.gm.graph.nodes if n.op == "get_attr"}
    assert set(got.constants()) == read


def test_the_graph_holds_no_in_place_operator():
    def f(m, a):
        b = a + 1
        b.mul_(2)
        return (b,)

    got = captured(f, torch.ones(2))
    assert [str(n.target) for n in got.gm.graph.nodes if n.op == "call_function"] == [
        "aten.add.Tensor",
        "aten.mul.Tensor",
    ]
    assert got.gm(torch.ones(2))[0].tolist() == [4.0, 4.0]


def data_dependent(m, a):
    return (a + 1 if a.sum() > 0 else a - 1,)


def test_what_cannot_be_traced_is_refused_by_the_graphs_name():
    with pytest.raises(ExportError, match=r"graph 'g': torch\.export could not trace it \(\w+: .+\)$") as refused:
        captured(data_dependent, torch.ones(2))
    assert refused.value.__cause__ is not None


def test_an_exception_without_words_is_named_by_its_type():
    def f(m, a):
        raise KeyError

    with pytest.raises(ExportError, match=r"graph 'g': .*not trace it \(KeyError: KeyError\)"):
        captured(f, torch.ones(2))


def test_a_strided_output_is_refused_by_its_name():
    with pytest.raises(ExportError, match="graph 'g': outputs turned are not contiguous, which the"):
        captured(lambda m, a: (a + 1, a.t()), torch.ones(2, 3), outputs=("plain", "turned"))


def test_weights_are_not_copied():
    weight = torch.ones(4)
    got = captured(lambda m, a: (a * m.w,), torch.ones(4), w=weight)
    assert got.constants()["w"].data_ptr() == weight.data_ptr()
