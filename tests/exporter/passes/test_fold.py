"""Fold: tables and column sums become buffers, no weight is stored twice, and the graph computes the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prebake.exporter.passes import fold
from prebake.exporter.passes.fold import fold_constants
from prebake.exporter.passes.prune import prune_dead_code


def traced(module: nn.Module, *args) -> torch.fx.GraphModule:
    return prune_dead_code(torch.export.export(module, args, strict=False).module())


def ops(gm) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]


def buffers(gm) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in gm.named_buffers() if name.startswith("folded")}


def folded(gm) -> torch.fx.GraphModule:
    return prune_dead_code(fold_constants(gm))


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Rotary(nn.Module):
    """Cosines and sines of token positions, made anew in each of two blocks, as FLUX makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Buffer(torch.arange(4.0))

    def turned(self, x):
        angles = self.positions[:, None] * 10000 ** (-torch.arange(8) / 8)
        return x * angles.cos() + x.flip(-1) * angles.sin()

    def forward(self, x):
        return (self.turned(self.turned(x)),)


def test_a_rotary_table_is_computed_once_and_stored_once(x):
    gm = traced(Rotary(), x)
    expected = gm(x)[0]
    assert ops(gm).count("cos.default") == ops(gm).count("sin.default") == 2
    gm = folded(gm)
    assert ops(gm) == ["mul.Tensor", "flip.default", "mul.Tensor", "add.Tensor"] * 2
    assert buffers(gm) == {"folded_0": (4, 8), "folded_1": (4, 8)}  # cos and sin, equal in both blocks
    assert [name for name, _ in gm.named_buffers()] == ["folded_0", "folded_1"]  # positions are read no more
    assert torch.equal(gm(x)[0], expected)


class Int8(nn.Module):
    """torchao's u8s8 product: the weights' column sums correct for the offset of the activations."""

    def __init__(self) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(
            torch.randint(-127, 127, (64, 16), dtype=torch.int8, generator=seeded), requires_grad=False
        )

    def forward(self, x):
        compensation = self.weight.sum(0, dtype=torch.int32) * 128
        return (torch._int_mm(x, self.weight) - compensation,)


def test_column_sums_of_an_int8_weight_are_folded():
    codes = torch.randint(-127, 127, (32, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    gm = traced(Int8(), codes)
    expected = gm(codes)[0]
    assert ops(gm) == ["sum.dim_IntList", "mul.Tensor", "_int_mm.default", "sub.Tensor"]
    gm = folded(gm)
    assert ops(gm) == ["_int_mm.default", "sub.Tensor"]
    assert buffers(gm) == {"folded_0": (16,)}
    assert torch.equal(gm(codes)[0], expected)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        return (x @ self.weight.t(),)


class FloatCopy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16).to(torch.bfloat16))

    def forward(self, x):
        return (x @ self.weight.float(),)


class Noise(nn.Module):
    """Random although it depends on constants alone: each run must draw anew."""

    def forward(self, x):
        return (x + torch.randn(4, 8),)


class Large(nn.Module):
    def forward(self, x):
        return (x.sum() + torch.arange(64.0),)


@pytest.mark.parametrize("module", [Transposed(), FloatCopy(), Noise()], ids=lambda m: type(m).__name__)
def test_what_would_store_a_weight_twice_or_freeze_noise_is_left(module, x):
    gm = traced(module, x)
    before, held = ops(gm), [n for n, _ in gm.named_parameters()]
    gm = folded(gm)
    assert ops(gm) == before
    assert [n for n, _ in gm.named_parameters()] == held
    assert not buffers(gm)


def test_a_table_above_the_limit_is_left(x, monkeypatch):
    assert buffers(folded(traced(Large(), x))) == {"folded_0": (64,)}
    monkeypatch.setattr(fold, "MAX_TABLE_BYTES", 64 * 4 - 1)
    gm = traced(Large(), x)
    before = ops(gm)
    assert ops(folded(gm)) == before


class TwoSums(nn.Module):
    """Equal values of other dtype or shape are not the same constant."""

    def forward(self, x):
        return (x + torch.ones(8) + torch.ones(1, 8) + torch.ones(8, dtype=torch.float64), x + torch.ones(8))


def test_equal_values_are_one_buffer_only_if_dtype_and_shape_agree(x):
    gm = traced(TwoSums(), x)
    expected = gm(x)
    gm = folded(gm)
    assert sorted(buffers(gm).values()) == [(1, 8), (8,), (8,)]
    assert all(torch.equal(a, b) for a, b in zip(gm(x), expected, strict=True))


class NamedAsFolded(nn.Module):
    """A model whose own buffer has the name that the pass would give."""

    def __init__(self) -> None:
        super().__init__()
        self.folded_0 = nn.Buffer(torch.full((8,), 3.0))

    def forward(self, x):
        return (x * self.folded_0 + torch.ones(8),)


def test_a_buffer_of_the_models_own_is_never_overwritten(x):
    gm = traced(NamedAsFolded(), x)
    expected = gm(x)[0]
    assert torch.equal(folded(gm)(x)[0], expected)


def test_folding_twice_changes_nothing(x):
    gm = folded(traced(Rotary(), x))
    listing, expected = str(gm.graph), gm(x)[0]
    gm = folded(gm)
    assert str(gm.graph) == listing
    assert torch.equal(gm(x)[0], expected)


def test_a_changed_table_changes_the_folded_graph(x):
    """The canary: the equalities above can fail."""
    gm = folded(traced(Rotary(), x))
    before = gm(x)[0].clone()
    gm.get_buffer("folded_0")[1, 1] += 0.1
    assert not torch.equal(gm(x)[0], before)
