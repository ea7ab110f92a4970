"""A Linear in 8 bits as one operator, and a convolution: weights by column, activations quantized per token as they come.

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

from ...runtime.errors import RecipeError
from ..private_torch import multiply_int8

INT8_LEVELS = 127.5
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
    a = token_maxima(tokens)
    q = (tokens / a / (1 / INT8_LEVELS)).round().clamp(-128, 127).to(torch.int8)
    y = multiply_int8(q, weight).float() * (scale / INT8_LEVELS) * a
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@torch.library.custom_op("prebake::w8a8_fp8", mutates_args=())
def w8a8_fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times `weight` [K, N] of float8_e4m3fn, else as `w8a8`. Products of two such numbers are exact in float32."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    a = token_maxima(tokens)
    q = (tokens / a / (1 / FP8_LEVELS)).clamp(-FP8_LEVELS, FP8_LEVELS).to(FP8)
    y = q.float() @ weight.float() * (scale / FP8_LEVELS) * a
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@w8a8.register_fake
@w8a8_fp8.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def map_rows(operator: Any) -> None:
    """Tells torch.vmap of a layer of x [..., K]: mapped over x, it is the same layer of more rows."""

    def more_rows(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *weights: Tensor | None) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        assert not any(in_dims[1:])
        return operator(x.movedim(in_dims[0], 0), *weights), 0

    torch.library.register_vmap(operator, more_rows)


map_rows(w8a8)
map_rows(w8a8_fp8)


@torch.library.custom_op("prebake::w8a8_conv2d", mutates_args=())
def w8a8_conv2d(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: int, stride: int, padding: int
) -> Tensor:
    """A convolution of x [B, C, H, W], whose every pixel is quantized as a token of `w8a8` is: [B, N, H', W'] in x's dtype, channels
    last in memory. `weight` is int8 [kernel * kernel * C, N], by rows of the kernel; steps and padding are those of both sides."""
    b, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).float()
    a = token_maxima(pixels)
    q = (pixels / a / (1 / INT8_LEVELS)).round().clamp(-128, 127).to(torch.int8)
    border = (0, 0, padding, padding, padding, padding)
    q, a = torch.nn.functional.pad(q, border), torch.nn.functional.pad(a, border)
    high, wide = ((n + 2 * padding - kernel) // stride + 1 for n in (h, w))
    y = torch.zeros(b, high, wide, weight.shape[1])
    for tap, columns in enumerate(weight.split(c)):
        i, j = divmod(tap, kernel)
        under = (slice(None), slice(i, i + stride * high, stride), slice(j, j + stride * wide, stride))
        y += multiply_int8(q[under].reshape(-1, c), columns).reshape(y.shape) * a[under]
    y = y * (scale / INT8_LEVELS)
    y = y if bias is None else y + bias
    return y.to(x.dtype).permute(0, 3, 1, 2)


@w8a8_conv2d.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: int, stride: int, padding: int) -> Tensor:
    high, wide = ((n + 2 * padding - kernel) // stride + 1 for n in x.shape[2:])
    return x.new_empty(x.shape[0], high, wide, weight.shape[1]).permute(0, 3, 1, 2)


INT8_OPERATOR, FP8_OPERATOR, CONV2D_OPERATOR = (
    torch.ops.prebake.w8a8,
    torch.ops.prebake.w8a8_fp8,
    torch.ops.prebake.w8a8_conv2d,
)


def token_maxima(tokens: Tensor) -> Tensor:
    """max |x| of each token, [T, 1], above 0."""
    return tokens.abs().amax(-1, keepdim=True).clamp_min(TINY)


class W8A8Linear(nn.Module):
    """What stands for a Linear: its weights quantized by `quantize_rows_int8`, as [in, out], for the operator that multiplies them."""

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


class W8A8Conv2d(nn.Module):
    """What stands for a Conv2d that `is_square_conv`, its weights quantized by `quantize_rows_int8`."""

    weight: Tensor
    scale: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        weight, scale = quantize_rows_int8(conv.weight.detach().permute(0, 2, 3, 1).flatten(1))
        self.register_buffer("weight", weight.t().contiguous())
        self.register_buffer("scale", scale)
        self.bias = conv.bias
        self.kernel, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        return CONV2D_OPERATOR(x, self.weight, self.scale, self.bias, self.kernel, self.stride, self.padding)


def is_square_conv(conv: nn.Conv2d) -> bool:
    """Whether it is as `w8a8_conv2d` has them: one group, and the same kernel, step and padding of zeros on all sides."""
    square = all(isinstance(n, tuple) and len(set(n)) == 1 for n in (conv.kernel_size, conv.stride, conv.padding))
    return square and conv.groups == 1 and conv.padding_mode == "zeros" and set(conv.dilation) == {1}


def quantize_rows_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as int8 in -128 .. 127, rounded to nearest, and its scales, float32 [N]: as in torchao."""
    rows = weight.float()
    scale = (rows.abs().amax(1) / INT8_LEVELS).clamp_min(torch.finfo(torch.float32).eps)
    return (rows * (1 / scale)[:, None]).round().clamp(-128, 127).to(torch.int8), scale


def quantize_rows_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as float8_e4m3fn, and its scales, float32 [N]: as in torchao, which makes NaN of a row of zeros."""
    rows = weight.float()
    scale = (rows.abs().amax(1) / FP8_LEVELS).clamp_min(TINY)
    return (rows / scale[:, None]).clamp(-FP8_LEVELS, FP8_LEVELS).to(FP8), scale


def refuse_convolutions(recipe: Any) -> None:
    """Raises RecipeError where a recipe asks for int8 convolutions of a backend that has none."""
    if recipe.quantize.quantizes_convolutions:
        raise RecipeError(
            "quantize.convolutions: only prebake's CPU kernels multiply them in int8 (compile.backend=aoti, compile.device=cpu, "
            "compile.options.kernels); set quantize.convolutions=false"
        )


def quantize_layers(model: nn.Module, names: set[str], recipe: Any) -> None:
    """Quantizes layers as a backend that knows these operators does."""
    replace_layers(model, names, recipe.quantize)


def replace_layers(model: nn.Module, names: set[str], method: Any) -> None:
    """Replaces the Linears and convolutions of these names in place. `method` is a table of `exporter/quantize`."""
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        parent, layer = model.get_submodule(path), model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            setattr(parent, leaf, W8A8Conv2d(layer))
        else:
            assert isinstance(layer, nn.Linear)
            setattr(parent, leaf, W8A8Linear(layer, method.quantize_rows, method.linear_operator()))
