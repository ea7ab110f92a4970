"""A Linear in 8 bits as one operator: weights by column, activations quantized per token as they come.

    y = quantized(x / a * levels) @ weight * (a / levels) * scale + bias        with a = max |x| over the features of a token

`prebake::w8a8` rounds to int8, where what rounds to 128 becomes 127, and `prebake::w8a8_fp8` to float8_e4m3fn: the arithmetic of
torchao's `Int8DynamicActivationInt8WeightConfig`, and of its `Float8DynamicActivationFloat8WeightConfig` by rows. As one operator it
survives torch.export, is counted as what it is, and each backend writes it in the form that its own matchers know (`onnx_graph.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 127.5
"""Where the largest magnitude of a token, or of a weight's row, lies among the integers -128 .. 127."""
FP8 = torch.float8_e4m3fn
FP8_LEVELS = torch.finfo(FP8).max
"""The same among the numbers of float8_e4m3fn, of which it is the largest: 448."""
TINY = torch.finfo(torch.float32).tiny
"""What a token of zeros is divided by."""


@torch.library.custom_op("prebake::w8a8", mutates_args=())
def w8a8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times int8 `weight` [K, N]: [..., N] in x's dtype. `scale` is float32 [N], `bias` [N] in any float dtype."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    a = largest(tokens)
    q = (tokens / a / (1 / LEVELS)).round().clamp(-128, 127).to(torch.int8)
    y = torch._int_mm(q, weight).float() * (scale / LEVELS) * a
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@torch.library.custom_op("prebake::w8a8_fp8", mutates_args=())
def w8a8_fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times `weight` [K, N] of float8_e4m3fn, else as `w8a8`. Products of two such numbers are exact in float32."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    a = largest(tokens)
    q = (tokens / a / (1 / FP8_LEVELS)).clamp(-FP8_LEVELS, FP8_LEVELS).to(FP8)
    y = q.float() @ weight.float() * (scale / FP8_LEVELS) * a
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@w8a8.register_fake
@w8a8_fp8.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


OPERATOR, FP8_OPERATOR = torch.ops.prebake.w8a8, torch.ops.prebake.w8a8_fp8


def largest(tokens: Tensor) -> Tensor:
    """max |x| of each token, [T, 1], above 0."""
    return tokens.abs().amax(-1, keepdim=True).clamp_min(TINY)


class W8A8Linear(nn.Module):
    """What stands for a Linear: its weights quantized by `by_row`, as [in, out], for the operator that multiplies them."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, by_row: Callable[[Tensor], tuple[Tensor, Tensor]], operator: Any):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = by_row(linear.weight.detach())
        self.register_buffer("weight", weight.t().contiguous())
        self.register_buffer("scale", scale)
        self.bias, self.operator = linear.bias, operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.weight, self.scale, self.bias)


def by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as int8 in -128 .. 127, rounded to nearest, and its scales, float32 [N]: as in torchao."""
    rows = weight.float()
    scale = (rows.abs().amax(1) / LEVELS).clamp_min(torch.finfo(torch.float32).eps)
    return (rows * (1 / scale)[:, None]).round().clamp(-128, 127).to(torch.int8), scale


def by_row_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as float8_e4m3fn, and its scales, float32 [N]: as in torchao, which makes NaN of a row of zeros."""
    rows = weight.float()
    scale = (rows.abs().amax(1) / FP8_LEVELS).clamp_min(TINY)
    return (rows / scale[:, None]).clamp(-FP8_LEVELS, FP8_LEVELS).to(FP8), scale


METHODS = {"int8_dynamic": (by_row, OPERATOR), "fp8_dynamic": (by_row_fp8, FP8_OPERATOR)}
"""`quantize.method` of a recipe -> how weights are quantized, and what multiplies them."""


def quantized(model: nn.Module, names: set[str], recipe: Any) -> None:
    """A backend's `quantized`, by these operators."""
    to_8_bits(model, names, recipe.quantize.method)


def to_8_bits(model: nn.Module, names: set[str], method: str) -> None:
    """Replaces the Linears of these names in place."""
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        parent, linear = model.get_submodule(path), model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(parent, leaf, W8A8Linear(linear, *METHODS[method]))
