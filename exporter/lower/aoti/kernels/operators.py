"""The operators that the kernels of this folder compute, with what they mean in torch: for fake tensors, and as the oracle."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ....private_torch import operator_family, operator_overload
from ...w8a8 import w8a8, w8a8_conv2d

PANEL = 32
"""Columns side by side in a packed weight: PANEL in w8a8.cpp."""


NO_NORM: tuple[Any, ...] = (0, 0.0, None, None)
"""The last arguments of `packed_w8a8_conv2d` without a norm."""
NO_ACTIVATION, GELU, GEGLU = range(3)
"""What an int8 layer ends with: nothing, GELU by the hyperbolic tangent, or its first half of columns times GELU of the second."""


@torch.library.custom_op("prebake::packed_w8a8", mutates_args=())
def packed_w8a8(xs: list[Tensor], packed: Tensor, scale: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """`prebake::w8a8` of `xs` [..., K_i] side by side, with a weight packed by `pack_columns`, or by `pack_gated` for GEGLU.

    `scale` and `bias` are float32 [N]. What comes out is [..., N], for GEGLU [..., N / 2], in the widest of the inputs' dtypes.
    """
    x = torch.cat(xs, -1)
    weight = unpack_columns(packed, x.shape[-1], len(scale))
    if act == GEGLU:
        weight = weight[:, gated_order(len(scale)).argsort()].contiguous()
    y = w8a8(x, weight, scale, bias)
    if act == GELU:
        return torch.nn.functional.gelu(y, approximate="tanh")
    if act == GEGLU:
        factors, gates = y.chunk(2, -1)
        return factors * torch.nn.functional.gelu(gates)
    return y


@packed_w8a8.register_fake
def _(xs: list[Tensor], packed: Tensor, scale: Tensor, bias: Tensor | None, act: int) -> Tensor:
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in xs))
    return xs[0].new_empty(*xs[0].shape[:-1], len(scale) // (2 if act == GEGLU else 1), dtype=dtype)


@torch.library.custom_op("prebake::packed_w8a8_conv2d", mutates_args=())
def packed_w8a8_conv2d(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    groups: int,
    epsilon: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> Tensor:
    """`prebake::w8a8_conv2d` with a weight packed by `pack_taps`. `scale` and `bias` are float32 [N]; x lies channels last.

    With `groups` other than 0 a convolution of silu(group_norm(x)); `norm_weight` and `norm_bias` are float32 [C].
    """
    weight, inside = unpack_taps(packed, kernel * kernel, x.shape[1], len(scale)), x
    if groups:
        inside = torch.nn.functional.group_norm(x.float(), groups, norm_weight, norm_bias, epsilon)
        inside = torch.nn.functional.silu(inside)
    return w8a8_conv2d(inside, weight, scale, bias, kernel, stride, padding).to(x.dtype)


@packed_w8a8_conv2d.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, kernel: int, stride: int, padding: int, *norm: Any
) -> Tensor:
    high, wide = ((n + 2 * padding - kernel) // stride + 1 for n in x.shape[2:])
    return x.new_empty(x.shape[0], high, wide, len(scale)).permute(0, 3, 1, 2)


@torch.library.custom_op("prebake::few_rows", mutates_args=())
def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Linear of few rows: x [..., K], weight [N, K] and bias [N], all float32 or all bfloat16; [..., N]."""
    return torch.nn.functional.linear(x, weight, bias)


@few_rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("prebake::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kT scale) v without a mask, bfloat16: q [B, H, S, D], k and v [B, H, T, D]. Lies as [B, S, H, D] in memory."""
    made = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return made.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale))


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    b, h, s, d = q.shape
    return q.new_empty(b, s, h, d).transpose(1, 2)


@torch.library.custom_op("prebake::rotary", mutates_args=())
def rotary(x: Tensor, cosines: Tensor, sines: Tensor, to_half: bool) -> Tensor:
    """Pairs (a, b) of neighbours in x [A, B, C, D] turned: (a cos - b sin, b cos + a sin), in bfloat16 or float32.

    `cosines` and `sines` are float32 [A or 1, B or 1, C or 1, D].
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = x.float() * cosines + torch.stack([-b, a], -1).flatten(-2) * sines
    return turned.to(torch.bfloat16 if to_half else torch.float32)


@rotary.register_fake
def _(x: Tensor, cosines: Tensor, sines: Tensor, to_half: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16 if to_half else torch.float32)


OPERATOR_NAMES = {
    operator_overload(operator): operator_family(operator_overload(operator))
    for operator in (packed_w8a8, packed_w8a8_conv2d, few_rows, attention, rotary)
}


def pack_columns(weight: Tensor) -> Tensor:
    """int8 [K, N] as w8a8.cpp reads it: for each PANEL of columns a row of bytes, first -128 times each column's sum as
    int32, then the weights, four features of a column side by side. K is filled up to fours with zeros, N to whole panels."""
    k, n = weight.shape
    filled = torch.zeros(-(-k // 4) * 4, -(-n // PANEL) * PANEL, dtype=torch.int8)
    filled[:k, :n] = weight
    panels = filled.reshape(-1, 4, filled.shape[1] // PANEL, PANEL).permute(2, 0, 3, 1).flatten(1)
    first = (-128 * filled.sum(0, dtype=torch.int64)).to(torch.int32).reshape(-1, PANEL)
    return torch.cat([first.view(torch.int8), panels], 1).contiguous()


def pack_gated(weight: Tensor) -> Tensor:
    """int8 [K, N] packed for GEGLU, N a multiple of PANEL: each panel has some of the first half and their gates."""
    return pack_columns(weight[:, gated_order(weight.shape[1])])


def gated_order(n: int) -> Tensor:
    """The order of `pack_gated`: half a panel of columns, then those half of all columns further on."""
    return torch.arange(n).reshape(2, -1, PANEL // 2).transpose(0, 1).flatten()


def unpack_columns(packed: Tensor, k: int, n: int) -> Tensor:
    """The int8 [K, N] that was packed."""
    panels = packed[:, 4 * PANEL :].reshape(len(packed), -1, PANEL, 4)
    return panels.permute(1, 3, 0, 2).reshape(-1, len(packed) * PANEL)[:k, :n].contiguous()


def pack_taps(weight: Tensor, taps: int = 1) -> Tensor:
    """int8 [taps * C, N] as convolution.cpp reads it: for each PANEL of columns what `pack_columns` makes of every tap."""
    return torch.cat([pack_columns(tap) for tap in weight.chunk(taps)], 1)


def unpack_taps(packed: Tensor, taps: int, c: int, n: int) -> Tensor:
    """The int8 [taps * C, N] that was packed."""
    return torch.cat([unpack_columns(tap, c, n) for tap in packed.chunk(taps, 1)])
