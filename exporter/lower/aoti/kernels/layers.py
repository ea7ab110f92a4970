"""Layers that are products with a constant weight: in int8, with what lies around them, and of few rows.

before  y = gelu(w8a8(cat([a, b]), weight, scale, bias))
        z = w8a8_conv2d(x, weight, scale, bias, ...)
        m = linear(x, weight, bias)                         with x of few rows
after   y = packed_w8a8([a, b], weight_packed, scale, bias, GELU)
        z = packed_w8a8_conv2d(x, weight_packed, scale, bias, ...)
        m = few_rows(x, weight, bias)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ....passes.derived_weights import DerivedWeights
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
from .refusal import Refusal

LINEAR = aten.linear.default
MAX_FEW_ROWS = 4
"""What `few_rows.cpp` is for: with more, a product is not bound by reading its weight."""
CONV2D_ARGUMENTS = ("x", "weight", "scale", "bias", "kernel", "stride", "padding")


def call_packed_linear(gm: fx.GraphModule, node: fx.Node, weights: DerivedWeights) -> tuple[Refusal, ...]:
    """An int8 layer with what lies around it: a concatenation before, a GELU or GEGLU behind. Its packed weight is stored, its
    bias in float32."""
    x, weight, scale, bias = node_arguments(node, ("x", "weight", "scale", "bias"))
    last, act, refused = node, NO_ACTIVATION, []
    for code, found in ((GELU, match_gelu(node)), (GEGLU, match_geglu(node))):
        if isinstance(found, Refusal):
            refused.append(found)
        elif found:
            last, act = found, code
    packing = ("gated", pack_gated) if act == GEGLU else ("packed", pack_taps)
    weight, bias = store_packed_weight(gm, node, weight, bias, weights, packing)
    with gm.graph.inserting_before(last):
        xs = [make_contiguous(gm, part) for part in concat_parts(x)]
        replace_call(gm, last, packed_w8a8, (xs, weight, scale, bias, act))
    return tuple(refused)


def call_packed_conv2d(gm: fx.GraphModule, node: fx.Node, weights: DerivedWeights) -> tuple[Refusal, ...]:
    """An int8 convolution, of a picture that lies channels last, with a GroupNorm and SiLU before it."""
    x, weight, scale, bias, kernel, stride, padding = node_arguments(node, CONV2D_ARGUMENTS)
    packing = ("packed", partial(pack_taps, taps=kernel * kernel))
    weight, bias = store_packed_weight(gm, node, weight, bias, weights, packing)
    found = match_norm_silu(gm, node, x)
    refused = (found,) if isinstance(found, Refusal) else ()
    x, norm = (x, NO_NORM) if found is None or isinstance(found, Refusal) else found
    with gm.graph.inserting_before(node):
        x = make_contiguous(gm, x, torch.channels_last)
        replace_call(gm, node, packed_w8a8_conv2d, (x, weight, scale, bias, kernel, stride, padding, *norm))
    return refused


def match_norm_silu(gm: fx.GraphModule, node: fx.Node, x: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | Refusal | None:
    """The input of silu(group_norm(...)), if x is that and has no other reader than the node, and the norm's arguments."""
    norm = x.args[0] if x.target is aten.silu.default else None
    if not isinstance(norm, fx.Node) or norm.target is not aten.group_norm.default:
        return None
    if only_reader(x) is not node or only_reader(norm) is not x:
        return Refusal("packed_w8a8_conv2d's norm", "others read it too")
    inside, groups, weight, bias, epsilon = node_arguments(norm, ("input", "groups", "weight", "bias", "eps"))
    if weight is None or bias is None:
        return Refusal("packed_w8a8_conv2d's norm", "without weight or bias")
    weight, bias = (cast_constant(gm, node, t) for t in (weight, bias))
    return inside, (groups, 1e-5 if epsilon is None else epsilon, weight, bias)


def store_packed_weight(
    gm: fx.GraphModule,
    node: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    weights: DerivedWeights,
    packing: tuple[str, Callable[[Tensor], Tensor]],
) -> tuple[fx.Node, fx.Node | None]:
    """The weight as a kernel reads it, and the bias in float32, before the node that uses them. `packing` is what is added to its
    name, and how it is made."""
    name = weights.store(gm, str(weight.target), *packing)
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


def concat_parts(x: fx.Node) -> list[fx.Node]:
    """The parts that x concatenates by features, if that is all it does and nothing else reads it; otherwise x."""
    if x.target not in (aten.cat.default, aten.concat.default) or len(x.users) > 1:
        return [x]
    parts, dim = node_arguments(x, ("tensors", "dim"))
    rank = len(x.meta["val"].shape)
    alike = all(p.meta["val"].dtype == x.meta["val"].dtype for p in parts)
    return list(parts) if alike and (dim or 0) % rank == rank - 1 else [x]


def match_gelu(node: fx.Node) -> fx.Node | Refusal | None:
    """The GELU by hyperbolic tangent that is the only reader of the node."""
    reader = only_reader(node)
    if reader is None or reader.target is not aten.gelu.default:
        return None
    if reader.kwargs.get("approximate") != "tanh":
        return Refusal("packed_w8a8's GELU", "exact, not by the tangent")
    return reader


def match_geglu(node: fx.Node) -> fx.Node | Refusal | None:
    """The product of the node's first half of features and the exact GELU of its second, if nothing else reads either."""
    halves = only_reader(node)
    if halves is None or halves.target not in (aten.chunk.default, aten.split.Tensor):
        return None
    parts = {part.args[1]: part for part in halves.users}
    if parts.keys() != {0, 1}:
        return None
    gelu, product = only_reader(parts[1]), only_reader(parts[0])
    if gelu is None or product is None or gelu.target is not aten.gelu.default:
        return None
    if (
        product.target is not aten.mul.Tensor
        or set(product.args) != {parts[0], gelu}
        or only_reader(gelu) is not product
    ):
        return None
    if obstacle := find_geglu_obstacle(node, halves, gelu):
        return Refusal("packed_w8a8's GEGLU", obstacle)
    return product


def find_geglu_obstacle(node: fx.Node, halves: fx.Node, gelu: fx.Node) -> str:
    """Why the kernel ends no layer with such halves and such a gate, or ""."""
    count, dim = node_arguments(halves, ("tensor", "parts", "dim"))[1:]
    columns, rank = node.meta["val"].shape[-1], len(node.meta["val"].shape)
    half = 2 if halves.target is aten.chunk.default else columns // 2
    if count != half or (dim or 0) % rank != rank - 1:
        return "not of two halves of the features"
    if columns % (2 * PANEL):
        return f"{columns} columns, no multiple of {2 * PANEL}"
    return "by the tangent, not exact" if gelu.kwargs.get("approximate", "none") != "none" else ""


def call_few_rows(gm: fx.GraphModule, node: fx.Node, weights: DerivedWeights) -> tuple[Refusal, ...]:
    """A Linear of few rows, whose weight lies as it is read."""
    x, weight, bias = node_arguments(node, ("input", "weight", "bias"))
    if obstacle := find_few_rows_obstacle(*(n.meta["val"] for n in (x, weight, bias) if n is not None)):
        return (Refusal("few_rows", obstacle),)
    with gm.graph.inserting_before(node):
        replace_call(gm, node, few_rows, (make_contiguous(gm, x), weight, bias))
    return ()


def find_few_rows_obstacle(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    """Why `few_rows.cpp` does not multiply such, or ""."""
    alike = {t.dtype for t in (x, weight, bias) if t is not None}
    rows = math.prod(x.shape[:-1])
    if not isinstance(rows, int):
        return "rows that follow the picture's size"
    if not 0 < rows <= MAX_FEW_ROWS:
        return f"more than {MAX_FEW_ROWS} rows" if rows else "no rows"
    if alike not in ({torch.float32}, {torch.bfloat16}):
        return "not all in float32, or all in bfloat16"
    return "" if weight.is_contiguous() else "a weight that does not lie in order"
