"""Layers that are products with a constant weight: in int8, with what lies around them, and of few rows.

before  y = gelu(w8a8(cat([a, b]), weight, scale, bias))
        z = w8a8_conv2d(x, weight, scale, bias, ...)
        m = linear(x, weight, bias)                         with x of few rows
after   y = packed_w8a8([a, b], weight_packed, scale, bias, GELU)
        z = packed_w8a8_conv2d(x, weight_packed, scale, bias, ...)
        m = few_rows(x, weight, bias)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ....passes.fold import find_tensor
from ....passes.fx_tools import aten, make_contiguous, node_arguments, only_reader, replace_call, store_buffer
from .operators import (
    GEGLU,
    GELU,
    NO_ACTIVATION,
    NO_NORM,
    PANEL,
    few_rows,
    pack_gated,
    pack_taps,
    packed_w8a8,
    packed_w8a8_conv2d,
)

LINEAR = aten.linear.default
MAX_FEW_ROWS = 4
"""What `few_rows.cpp` is for: with more, a product is not bound by reading its weight."""
CONV2D_ARGUMENTS = ("x", "weight", "scale", "bias", "kernel", "stride", "padding")


class PackedWeight:
    """A packed weight, and the one it is made from, which lives as long, so that its address stays its own."""

    def __init__(self, weight: Tensor, pack: Callable[[Tensor], Tensor]):
        self.weight = weight
        self.tensor = pack(weight)


PACKED_WEIGHTS: weakref.WeakValueDictionary[tuple[Any, ...], PackedWeight] = weakref.WeakValueDictionary()
"""What the graphs that are alive have packed: variants of a model share its weights, and go on sharing them."""


def call_packed_linear(gm: fx.GraphModule, node: fx.Node, kept: dict[str, PackedWeight]) -> None:
    """An int8 layer with what lies around it: a concatenation before, a GELU or GEGLU behind. Its packed weight is stored, its
    bias in float32."""
    x, weight, scale, bias = node_arguments(node, ("x", "weight", "scale", "bias"))
    last, act = node, NO_ACTIVATION
    for code, found in ((GELU, match_gelu(node)), (GEGLU, match_geglu(node))):
        if found:
            last, act = found, code
    weight, bias = store_packed_weight(
        gm, node, weight, bias, kept, ("gated", pack_gated) if act == GEGLU else ("packed", pack_taps)
    )
    with gm.graph.inserting_before(last):
        xs = [make_contiguous(gm, part) for part in concat_parts(x)]
        replace_call(gm, last, packed_w8a8, (xs, weight, scale, bias, act))


def call_packed_conv2d(gm: fx.GraphModule, node: fx.Node, kept: dict[str, PackedWeight]) -> None:
    """An int8 convolution, of a picture that lies channels last, with a GroupNorm and SiLU before it."""
    x, weight, scale, bias, kernel, stride, padding = node_arguments(node, CONV2D_ARGUMENTS)
    weight, bias = store_packed_weight(
        gm, node, weight, bias, kept, ("packed", partial(pack_taps, taps=kernel * kernel))
    )
    x, norm = match_norm_silu(gm, node, x) or (x, NO_NORM)
    with gm.graph.inserting_before(node):
        x = make_contiguous(gm, x, torch.channels_last)
        replace_call(gm, node, packed_w8a8_conv2d, (x, weight, scale, bias, kernel, stride, padding, *norm))


def match_norm_silu(gm: fx.GraphModule, node: fx.Node, x: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """The input of silu(group_norm(...)), if x is that and has no other reader than the node, and the norm's arguments."""
    norm = x.args[0] if x.target is aten.silu.default and only_reader(x) is node else None
    if not isinstance(norm, fx.Node) or norm.target is not aten.group_norm.default or only_reader(norm) is not x:
        return None
    inside, groups, weight, bias, epsilon = node_arguments(norm, ("input", "groups", "weight", "bias", "eps"))
    if weight is None or bias is None:
        return None
    weight, bias = (cast_constant(gm, node, t) for t in (weight, bias))
    return inside, (groups, 1e-5 if epsilon is None else epsilon, weight, bias)


def store_packed_weight(
    gm: fx.GraphModule,
    node: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    kept: dict[str, PackedWeight],
    packing: tuple[str, Callable[[Tensor], Tensor]],
) -> tuple[fx.Node, fx.Node | None]:
    """The weight as a kernel reads it, and the bias in float32, before the node that uses them. `packing` is what is added to its
    name, and how it is made."""
    name = f"{weight.target}_{packing[0]}"
    if name not in kept:
        kept[name] = pack_weight(find_tensor(gm, str(weight.target)), *packing)
        store_buffer(gm, name, kept[name].tensor)
    with gm.graph.inserting_before(node):
        return gm.graph.get_attr(name), None if bias is None else cast_constant(gm, node, bias)


def cast_constant(gm: fx.GraphModule, node: fx.Node, constant: fx.Node) -> fx.Node:
    """A constant in float32, before the node that uses it."""
    value = find_tensor(gm, str(constant.target))
    if value.dtype == torch.float32:
        return constant
    store_buffer(gm, f"{constant.target}_float", value.detach().float())
    with gm.graph.inserting_before(node):
        return gm.graph.get_attr(f"{constant.target}_float")


def pack_weight(weight: Tensor, how: str, pack: Callable[[Tensor], Tensor]) -> PackedWeight:
    key = (weight.data_ptr(), tuple(weight.shape), weight.stride(), how)
    made = PACKED_WEIGHTS.get(key)
    if made is None:
        made = PACKED_WEIGHTS[key] = PackedWeight(weight, pack)
    return made


def concat_parts(x: fx.Node) -> list[fx.Node]:
    """The parts that x concatenates by features, if that is all it does and nothing else reads it; otherwise x."""
    if x.target not in (aten.cat.default, aten.concat.default) or len(x.users) > 1:
        return [x]
    parts, dim = node_arguments(x, ("tensors", "dim"))
    rank = len(x.meta["val"].shape)
    alike = all(p.meta["val"].dtype == x.meta["val"].dtype for p in parts)
    return list(parts) if alike and (dim or 0) % rank == rank - 1 else [x]


def match_gelu(node: fx.Node) -> fx.Node | None:
    """The GELU by hyperbolic tangent that is the only reader of the node."""
    (reader, *others) = node.users
    if others or reader.target is not aten.gelu.default or reader.kwargs.get("approximate") != "tanh":
        return None
    return reader


def match_geglu(node: fx.Node) -> fx.Node | None:
    """The product of the node's first half of features and the exact GELU of its second, if nothing else reads either."""
    halves = only_reader(node)
    if halves is None or halves.target not in (aten.chunk.default, aten.split.Tensor):
        return None
    count, dim = node_arguments(halves, ("tensor", "parts", "dim"))[1:]
    columns, rank = node.meta["val"].shape[-1], len(node.meta["val"].shape)
    parts = {part.args[1]: part for part in halves.users}
    whole = count == (2 if halves.target is aten.chunk.default else columns // 2) and columns % (2 * PANEL) == 0
    if not whole or (dim or 0) % rank != rank - 1 or parts.keys() != {0, 1}:
        return None
    gelu, product = only_reader(parts[1]), only_reader(parts[0])
    if (
        gelu is None
        or product is None
        or gelu.target is not aten.gelu.default
        or gelu.kwargs.get("approximate", "none") != "none"
    ):
        return None
    fits = product.target is aten.mul.Tensor and only_reader(gelu) is product
    return product if fits and set(product.args) == {parts[0], gelu} else None


def call_few_rows(gm: fx.GraphModule, node: fx.Node) -> None:
    """A Linear of few rows, whose weight lies as it is read."""
    x, weight, bias = node_arguments(node, ("input", "weight", "bias"))
    if is_few_rows(*(n.meta["val"] for n in (x, weight, bias) if n is not None)):
        with gm.graph.inserting_before(node):
            replace_call(gm, node, few_rows, (make_contiguous(gm, x), weight, bias))


def is_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `few_rows.cpp` multiplies such."""
    alike = {t.dtype for t in (x, weight, bias) if t is not None}
    rows = x.numel() // max(x.shape[-1], 1)
    return alike in ({torch.float32}, {torch.bfloat16}) and 0 < rows <= MAX_FEW_ROWS and weight.is_contiguous()
