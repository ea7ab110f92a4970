"""The grids on which kinds of operators are measured, and where in them a call lies.

Three kinds have grids: products by rows, inner and outer width; convolutions in two dimensions by pixels of the result and
channels, a table for 1 x 1 and one for larger kernels; attention by queries, keys and width of a head. Each operator, dtype
and layout has a table of its own. `grid_call` is the call that is timed at a point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...runtime.rates.rates_file import RateTable
from ..lower import w8a8
from .count import HeavyCall, Operand

aten = torch.ops.aten
WIDTHS = (64, 320, 1280, 5120)
CHANNELS = (4, 64, 320, 1280)
AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "matmul": {"rows": (1, 16, 128, 512), "inner": WIDTHS, "outer": WIDTHS},
    "convolution": {"pixels": (64, 1024, 16384), "inner": CHANNELS, "outer": CHANNELS},
    "attention": {
        "queries": (64, 256, 1024),
        "keys": (77, 256, 1024, 4096),
        "width": (32, 40, 64, 80, 128, 160),
    },
}
"""The sizes are those of diffusers' models, thinned out, and a few below."""
OPERATORS_BY_COLUMN = (aten._int_mm.default, w8a8.INT8_OPERATOR.default, w8a8.FP8_OPERATOR.default)
"""Products of weights [inner, outer]; a Linear's are [outer, inner]."""
PLAIN_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
PLAIN_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding, aten.convolution.default)


@dataclass(frozen=True)
class GridKind:
    """One table's operator: `kind` names its axes, `dtypes` are of the operands, `kernel` is a convolution's side."""

    kind: str
    op: Any
    dtypes: tuple[torch.dtype, ...]
    kernel: int = 1
    channels_last: bool = False
    masked: bool = False

    @property
    def name(self) -> str:
        """`convolution aten.conv2d.default float32 3x3 channels_last`."""
        dtypes = dict.fromkeys(str(d).removeprefix("torch.") for d in self.dtypes)
        notes = [f"{self.kernel}x{self.kernel}"] if self.kind == "convolution" else []
        notes += ["channels_last"] * self.channels_last + ["masked"] * self.masked
        return " ".join((self.kind, str(self.op), "x".join(dtypes), *notes))

    @property
    def axes(self) -> Mapping[str, tuple[int, ...]]:
        return AXES[self.kind]


@dataclass(frozen=True)
class GridPlace:
    """Where in a kind's grid a call lies: a number for each axis."""

    kind: GridKind
    at: tuple[int, ...]


def place_call(call: HeavyCall) -> GridPlace | None:
    """The call's place; None for one that no grid is of: of one dimension or three, grouped, transposed."""
    places = {"matmul": place_product, "convolution": place_convolution, "attention": place_attention}
    return places[call.kind](call)


def place_product(call: HeavyCall) -> GridPlace | None:
    name = str(call.op).split(".")[1]
    x, weight = call.operands[1:3] if name in ("addmm", "baddbmm") else call.operands[:2]
    if len(x.shape) < 2 or len(weight.shape) < 2:
        return None
    inner, every_row = x.shape[-1], math.prod(x.shape[:-1])
    outer, left = divmod(call.flops, 2 * inner * every_row)
    if left or not outer:
        return None
    if call.op in OPERATORS_BY_COLUMN:
        kind = GridKind("matmul", call.op, (x.dtype, weight.dtype))
    elif name in PLAIN_PRODUCTS and x.dtype == weight.dtype:
        kind = GridKind("matmul", aten.linear.default, (x.dtype, weight.dtype))
    else:
        return None
    return GridPlace(kind, (every_row // math.prod(weight.shape[:-2]) or 1, inner, outer))


def place_convolution(call: HeavyCall) -> GridPlace | None:
    x, weight = call.operands[:2]
    if len(x.shape) != 4:
        return None
    if call.op is w8a8.CONV2D_OPERATOR.default:
        side, outer = call.arguments[4], weight.shape[1]
        kind = GridKind("convolution", call.op, (x.dtype, weight.dtype), 1 if side == 1 else 3)
        taps = side * side
    elif call.op in PLAIN_CONVOLUTIONS and weight.shape[1] == x.shape[1] and not is_transposed(call):
        outer, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
        last = is_channels_last(x) or is_channels_last(weight)
        kind = GridKind("convolution", aten.conv2d.default, (x.dtype, weight.dtype), 1 if taps == 1 else 3, last)
    else:
        return None
    pixels = call.flops // (2 * taps * x.shape[1] * outer * x.shape[0])
    return GridPlace(kind, (max(pixels, 1), x.shape[1], outer))


def is_transposed(call: HeavyCall) -> bool:
    return call.op is aten.convolution.default and bool(call.arguments[6])


def is_channels_last(o: Operand) -> bool:
    """Whether neighbours in memory are channels of one pixel; of a single channel or pixel nobody can tell."""
    return o.stride[1] == 1 and o.shape[1] > 1 and math.prod(o.shape[2:]) > 1


def place_attention(call: HeavyCall) -> GridPlace | None:
    q, k = call.operands[:2]
    if len(q.shape) != 4 or len(k.shape) != 4:
        return None
    masked = len(call.operands) > 3 or dict(call.keywords).get("is_causal") is True or True in call.arguments
    kind = GridKind("attention", aten.scaled_dot_product_attention.default, (q.dtype,), masked=masked)
    return GridPlace(kind, (q.shape[2], k.shape[2], q.shape[3]))


# --- the calls of a grid ------------------------------------------------------------------------------------------------


def grid_points(kind: GridKind) -> Iterator[tuple[int, ...]]:
    """Every point, the last axis first to change."""
    return itertools.product(*kind.axes.values())


def grid_call(kind: GridKind, at: tuple[int, ...]) -> HeavyCall:
    """What is timed at a point."""
    return {"matmul": product_call, "convolution": convolution_call, "attention": attention_call}[kind.kind](kind, *at)


def product_call(kind: GridKind, rows: int, inner: int, outer: int) -> HeavyCall:
    flops = 2 * rows * inner * outer
    x_dtype, weight_dtype = kind.dtypes
    if kind.op is aten.linear.default:
        weight = plain_operand((outer, inner), weight_dtype, constant=True)
        return HeavyCall(kind.op, (plain_operand((1, rows, inner), x_dtype), weight), (), flops)
    weight = Operand((inner, outer), (1, inner), weight_dtype, True)
    if kind.op is aten._int_mm.default:
        return HeavyCall(kind.op, (plain_operand((rows, inner), x_dtype), weight), (), flops)
    scale = plain_operand((outer,), torch.float32, constant=True)
    return HeavyCall(kind.op, (plain_operand((1, rows, inner), x_dtype), weight, scale, None), (), flops)


def convolution_call(kind: GridKind, pixels: int, inner: int, outer: int) -> HeavyCall:
    side, k = math.isqrt(pixels), kind.kernel
    flops = 2 * pixels * inner * outer * k * k
    if kind.op is w8a8.CONV2D_OPERATOR.default:
        x = plain_operand((1, inner, side, side), kind.dtypes[0], channels_last=True)
        weight = plain_operand((k * k * inner, outer), kind.dtypes[1], constant=True)
        scale = plain_operand((outer,), torch.float32, constant=True)
        return HeavyCall(kind.op, (x, weight, scale, None, k, 1, k // 2), (), flops)
    x = plain_operand((1, inner, side, side), kind.dtypes[0], channels_last=kind.channels_last)
    weight = plain_operand((outer, inner, k, k), kind.dtypes[1], constant=True, channels_last=kind.channels_last)
    return HeavyCall(kind.op, (x, weight, None, (1, 1), (k // 2, k // 2)), (), flops)


def attention_call(kind: GridKind, queries: int, keys: int, width: int) -> HeavyCall:
    heads = torch.get_num_threads()
    q, k = (plain_operand((1, heads, n, width), kind.dtypes[0]) for n in (queries, keys))
    mask = (plain_operand((1, 1, queries, keys), kind.dtypes[0]),) if kind.masked else ()
    return HeavyCall(kind.op, (q, k, k, *mask), (), 4 * heads * queries * keys * width)


def plain_operand(
    shape: tuple[int, ...], dtype: torch.dtype, *, constant: bool = False, channels_last: bool = False
) -> Operand:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return Operand(shape, torch.empty(shape, device="meta", memory_format=layout).stride(), dtype, constant)


# --- between the points -------------------------------------------------------------------------------------------------


def interpolate_rate(table: RateTable, at: tuple[int, ...]) -> float:
    """GFLOP/s between the points: linear in the logarithms of sizes and rate; beyond the grid that of its edge."""
    rates = [math.log(rate) for rate in table.gflops]
    for axis, wanted in reversed(list(zip(table.axes.values(), at, strict=True))):
        left, share = find_neighbours(axis, wanted)
        right = min(left + 1, len(axis) - 1)
        rates = [rates[i + left] * (1 - share) + rates[i + right] * share for i in range(0, len(rates), len(axis))]
    return math.exp(rates[0])


def find_neighbours(axis: tuple[int, ...], wanted: int) -> tuple[int, float]:
    """The index of the number below, and how far the wanted one is on the way to the next, 0 to 1."""
    for i, (low, high) in enumerate(itertools.pairwise(axis)):
        if wanted <= high:
            return i, max(0.0, math.log(wanted / low) / math.log(high / low))
    return len(axis) - 1, 0.0
