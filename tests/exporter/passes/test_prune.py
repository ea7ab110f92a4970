"""Prune: what no output reads is gone, whatever FX believes about its purity, and the rest computes the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prebake.exporter.passes.prune import prune_dead_code


class Block(nn.Module):
    """An attention behind a linear, then a projection. With `reuse`, a stored value stands in for the attention's."""

    def __init__(self, reuse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.reuse = nn.Linear(8, 24), nn.Linear(8, 8), reuse

    def forward(self, x, slot):
        q, k, v = self.qkv(x).chunk(3, -1)
        attention = F.dropout(F.scaled_dot_product_attention(q, k, v), 0.1, training=True)
        return (self.out(slot if self.reuse else attention + slot),)


def traced(module: nn.Module, *args) -> torch.fx.GraphModule:
    return torch.export.export(module, args, strict=False).module()


def ops(gm) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]


def held(gm) -> list[str]:
    return sorted([n for n, _ in gm.named_parameters()] + [n for n, _ in gm.named_buffers()])


@pytest.fixture
def args():
    seeded = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, 8, generator=seeded), torch.randn(1, 4, 8, generator=seeded)


ATTENTION = [
    "linear.default",
    "chunk.default",
    "getitem",
    "getitem",
    "getitem",
    "scaled_dot_product_attention.default",
    "dropout.default",
]


def named(found: list[str]) -> list[str]:
    return ["getitem" if "getitem" in op else op for op in found]


def test_a_dead_attention_goes_with_its_inputs_and_weights(args):
    gm = traced(Block(reuse=True), *args)
    assert named(ops(gm)) == [*ATTENTION, "linear.default"]
    assert held(gm) == ["out.bias", "out.weight", "qkv.bias", "qkv.weight"]
    expected = gm(*args)[0]
    gm = prune_dead_code(gm)
    assert ops(gm) == ["linear.default"]
    assert held(gm) == ["out.bias", "out.weight"]
    assert torch.equal(gm(*args)[0], expected)


def test_fx_alone_keeps_the_random_op_and_all_that_feeds_it(args):
    """Why the pass exists; when this fails, FX has learnt it and `is_impure_node` can go."""
    gm = traced(Block(reuse=True), *args)
    gm.graph.eliminate_dead_code()
    assert "dropout.default" in ops(gm)
    assert ops(gm).count("linear.default") == 2


def test_a_live_attention_stays(args):
    gm = traced(Block(reuse=False), *args)
    before, expected_weights = ops(gm), held(gm)
    gm = prune_dead_code(gm)
    assert ops(gm) == before
    assert held(gm) == expected_weights


class Checked(nn.Module):
    """`_assert_tensor_metadata`, as `Tensor.to` leaves it, on a value that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.ones(8))

    def forward(self, x):
        dead = (x * self.table).to(torch.bfloat16)
        dead.sum()
        return (x + 1,)


def test_assertions_on_dead_values_go(args):
    gm = traced(Checked(), args[0])
    assert any("assert" in op for op in ops(gm))
    gm = prune_dead_code(gm)
    assert ops(gm) == ["add.Tensor"]
    assert held(gm) == []


class Tied(nn.Module):
    """Two modules that hold one parameter, of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        self.a(x)
        return (self.b(x),)


def test_a_tied_weight_survives_while_one_of_its_users_lives(args):
    gm = traced(Tied(), args[0])
    expected = gm(args[0])[0]
    gm = prune_dead_code(gm)
    assert ops(gm) == ["linear.default"]
    assert torch.equal(gm(args[0])[0], expected)


def test_an_input_that_nothing_reads_stays_an_input(args):
    """The call contract has it, whichever variant is called."""
    gm = traced(Block(reuse=True), *args)
    assert len(prune_dead_code(gm).graph.find_nodes(op="placeholder")) == 2


def test_pruning_twice_changes_nothing(args):
    once = prune_dead_code(traced(Block(reuse=True), *args))
    listing = str(once.graph)
    assert str(prune_dead_code(once).graph) == listing


def test_a_changed_weight_changes_the_pruned_graph(args):
    """The canary: the equality above can fail."""
    gm = prune_dead_code(traced(Block(reuse=True), *args))
    before = gm(*args)[0].clone()
    with torch.no_grad():
        gm.get_parameter("out.weight")[0, 0] += 0.1
    assert not torch.equal(gm(*args)[0], before)
