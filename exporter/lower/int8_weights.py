"""A Linear and a convolution whose weights alone are in 8 bits: activations, products and sums keep their own precision.

    y = (x @ weight) * scale + bias        with int8 `weight` as numbers of x's dtype, and a `scale` for each output channel

Numbers of 8 bits are exact in every dtype that x may have, so what is lost is lost when the weight is rounded. The operators are
made of others: Inductor takes them apart by itself, and `onnx/graph.py` writes them as a dequantized weight and a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import RecipeError
from .w8a8 import quantize_rows_int8

OPERATORS = torch.library.Library("prebake", "FRAGMENT")
OPERATORS.define("int8_weight_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
OPERATORS.define(
    "int8_weight_conv2d(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor"
)


@torch.library.impl(OPERATORS, "int8_weight_linear", "CompositeImplicitAutograd")
def int8_weight_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times int8 `weight` [K, N]: [..., N] in x's dtype. `scale` is float32 [N], `bias` [N] in any float dtype."""
    y = x @ weight.to(x.dtype) * scale
    return (y if bias is None else y + bias).to(x.dtype)


@torch.library.impl(OPERATORS, "int8_weight_conv2d", "CompositeImplicitAutograd")
def int8_weight_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The convolution of x [B, C, H, W] by int8 `weight` [N, C / groups, h, w]: [B, N, H', W'] in x's dtype."""
    y = nn.functional.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups) * scale[:, None, None]  # pyright: ignore[reportArgumentType]
    return (y if bias is None else y + bias[:, None, None]).to(x.dtype)


LINEAR_OPERATOR = torch.ops.prebake.int8_weight_linear
CONV2D_OPERATOR = torch.ops.prebake.int8_weight_conv2d


class Int8WeightLinear(nn.Module):
    """What stands for a Linear: its weight as [in, out]."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows, scale = quantize_rows_int8(linear.weight.detach())
        self.register_buffer("weight", rows.t().contiguous())
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return LINEAR_OPERATOR(x, self.weight, self.scale, self.bias)


class Int8WeightConv2d(nn.Module):
    """What stands for a Conv2d that `is_plain_conv`."""

    weight: Tensor
    scale: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        rows, scale = quantize_rows_int8(conv.weight.detach().flatten(1))
        self.register_buffer("weight", rows.reshape(conv.weight.shape))
        self.register_buffer("scale", scale)
        self.bias = conv.bias
        self.shape: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        return CONV2D_OPERATOR(x, self.weight, self.scale, self.bias, *self.shape)


def is_plain_conv(conv: nn.Conv2d) -> bool:
    """Whether it pads with zeros, by numbers."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def replace_layers(model: nn.Module, names: set[str]) -> None:
    """Replaces the Linears and convolutions of these names in place."""
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        parent, layer = model.get_submodule(path), model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            setattr(parent, leaf, Int8WeightConv2d(layer))
        else:
            assert isinstance(layer, nn.Linear)
            setattr(parent, leaf, Int8WeightLinear(layer))


def refuse_components(recipe: Any, why: str) -> None:
    """Raises RecipeError where a recipe asks for int8 outside of the denoiser, and gets none."""
    for key in ("text_encoders", "vae"):
        if (mode := getattr(recipe.quantize, key)) != "none":
            raise RecipeError(f"quantize.{key} {mode!r}: {why}; set quantize.{key}=none")
