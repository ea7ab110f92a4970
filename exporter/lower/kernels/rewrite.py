"""Where a captured graph does what a kernel does, it calls the kernel.

    before  y = gelu(w8a8(cat([a, b]), weight, scale, bias))
            z = w8a8_conv2d(x, weight, scale, bias, ...)
            o = scaled_dot_product_attention(q, k, v)
    after   y = packed_w8a8([a, b], weight_packed, scale, bias, GELU)
            z = packed_w8a8_conv2d(x, weight_packed, scale, bias, ...)
            o = attention(q, k, v, scale)

and `linear` of few rows is `few_rows`. Attention in bfloat16 without a mask only: a kernel that changed a graph's precision would do it unasked.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ...capture import Captured
from ...rewrite.fold import get_tensor
from ...rewrite.prune import prune
from .. import w8a8
from .operators import (
    GEGLU,
    GELU,
    PANEL,
    PLAIN,
    attention,
    few_rows,
    pack_gated,
    pack_taps,
    packed_w8a8,
    packed_w8a8_conv2d,
    rotary,
)

aten = torch.ops.aten
LINEAR = aten.linear.default
FEW_ROWS = 4
"""What `few_rows.cpp` is for: with more, a product is not bound by reading its weight."""
SDPA = aten.scaled_dot_product_attention.default
CONV2D_ARGUMENTS = ("x", "weight", "scale", "bias", "kernel", "stride", "padding")
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Packed:
    """A packed weight, and the one it is made from, which lives as long, so that its address stays its own."""

    def __init__(self, weight: Tensor, pack: Callable[[Tensor], Tensor]):
        self.weight = weight
        self.tensor = pack(weight)


PACKED: weakref.WeakValueDictionary[tuple[Any, ...], Packed] = weakref.WeakValueDictionary()
"""What the graphs that are alive have packed: variants of a model share its weights, and go on sharing them."""


def calling_kernels(graph: Captured) -> Captured:
    """The graph, calling kernels where they fit; the same tensors up to rounding."""
    gm = fx.GraphModule(graph.gm, copy.deepcopy(graph.gm.graph))
    kept: dict[str, Packed] = {}
    for node in list(gm.graph.nodes):
        if node.target is w8a8.OPERATOR.default:
            multiply(gm, node, kept)
        elif node.target is w8a8.CONV2D.default:
            convolve(gm, node, kept)
        elif node.target is LINEAR:
            read_once(gm, node)
        elif node.target is SDPA:
            attend(gm, node)
        elif node.target is aten.add.Tensor:
            turn(gm, node)
    gm.meta["packed"] = tuple(kept.values())
    return replace(graph, gm=prune(gm))


def multiply(gm: fx.GraphModule, node: fx.Node, kept: dict[str, Packed]) -> None:
    """An int8 layer with what lies around it: a concatenation before, a GELU or GEGLU behind. Its packed weight is stored, its
    bias in float32."""
    x, weight, scale, bias = arguments(node, ("x", "weight", "scale", "bias"))
    last, act = node, PLAIN
    for code, found in ((GELU, gelu_of(node)), (GEGLU, geglu_of(node))):
        if found:
            last, act = found, code
    weight, bias = stored(
        gm, node, weight, bias, kept, ("gated", pack_gated) if act == GEGLU else ("packed", pack_taps)
    )
    with gm.graph.inserting_before(last):
        xs = [contiguous(gm, part) for part in joined(x)]
        swap(gm, last, packed_w8a8, (xs, weight, scale, bias, act))


def convolve(gm: fx.GraphModule, node: fx.Node, kept: dict[str, Packed]) -> None:
    """An int8 convolution, of a picture that lies channels last."""
    x, weight, scale, bias, kernel, stride, padding = arguments(node, CONV2D_ARGUMENTS)
    weight, bias = stored(gm, node, weight, bias, kept, ("packed", partial(pack_taps, taps=kernel * kernel)))
    with gm.graph.inserting_before(node):
        x = contiguous(gm, x, torch.channels_last)
        swap(gm, node, packed_w8a8_conv2d, (x, weight, scale, bias, kernel, stride, padding))


def stored(
    gm: fx.GraphModule,
    node: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    kept: dict[str, Packed],
    packing: tuple[str, Callable[[Tensor], Tensor]],
) -> tuple[fx.Node, fx.Node | None]:
    """The weight as a kernel reads it, and the bias in float32, before the node that uses them. `packing` is what is added to its
    name, and how it is made."""
    name = f"{weight.target}_{packing[0]}"
    if name not in kept:
        kept[name] = packed(get_tensor(gm, str(weight.target)), *packing)
        register(gm, name, kept[name].tensor)
    with gm.graph.inserting_before(node):
        if bias is not None and (value := get_tensor(gm, str(bias.target))).dtype != torch.float32:
            register(gm, f"{bias.target}_float", value.detach().float())
            bias = gm.graph.get_attr(f"{bias.target}_float")
        return gm.graph.get_attr(name), bias


def joined(x: fx.Node) -> list[fx.Node]:
    """What x concatenates by features, if that is all it does and nothing else reads it; otherwise x."""
    if x.target not in (aten.cat.default, aten.concat.default) or len(x.users) > 1:
        return [x]
    parts, dim = arguments(x, ("tensors", "dim"))
    rank = len(x.meta["val"].shape)
    alike = all(p.meta["val"].dtype == x.meta["val"].dtype for p in parts)
    return list(parts) if alike and (dim or 0) % rank == rank - 1 else [x]


def gelu_of(node: fx.Node) -> fx.Node | None:
    """The GELU by hyperbolic tangent that is the only reader of the node."""
    (reader, *others) = node.users
    if others or reader.target is not aten.gelu.default or reader.kwargs.get("approximate") != "tanh":
        return None
    return reader


def geglu_of(node: fx.Node) -> fx.Node | None:
    """The product of the node's first half of features and the exact GELU of its second, if nothing else reads either."""
    halves = only_reader(node)
    if halves is None or halves.target not in (aten.chunk.default, aten.split.Tensor):
        return None
    count, dim = arguments(halves, ("tensor", "parts", "dim"))[1:]
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


def only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def packed(weight: Tensor, how: str, pack: Callable[[Tensor], Tensor]) -> Packed:
    key = (weight.data_ptr(), tuple(weight.shape), weight.stride(), how)
    made = PACKED.get(key)
    if made is None:
        made = PACKED[key] = Packed(weight, pack)
    return made


def register(gm: fx.GraphModule, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    gm.get_submodule(path).register_buffer(leaf, value)


def attend(gm: fx.GraphModule, node: fx.Node) -> None:
    """An attention, if it is one that the kernel does."""
    q, k, v, mask, dropout, causal, scale, grouped = arguments(node, SDPA_ARGUMENTS)
    values = [t.meta["val"] for t in (q, k, v)]
    if mask is not None or dropout or causal or grouped or not fits(*values):
        return
    scale = values[0].shape[-1] ** -0.5 if scale is None else scale
    with gm.graph.inserting_before(node):
        inside = [t if t.meta["val"].stride(-1) == 1 else contiguous(gm, t) for t in (q, k, v)]
        swap(gm, node, attention, (*inside, float(scale)))


def read_once(gm: fx.GraphModule, node: fx.Node) -> None:
    """A Linear of few rows, whose weight lies as it is read."""
    x, weight, bias = arguments(node, ("input", "weight", "bias"))
    if is_few_rows(*(n.meta["val"] for n in (x, weight, bias) if n is not None)):
        with gm.graph.inserting_before(node):
            swap(gm, node, few_rows, (contiguous(gm, x), weight, bias))


def is_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `few_rows.cpp` multiplies such."""
    alike = {t.dtype for t in (x, weight, bias) if t is not None}
    rows = x.numel() // max(x.shape[-1], 1)
    return alike in ({torch.float32}, {torch.bfloat16}) and 0 < rows <= FEW_ROWS and weight.is_contiguous()


CASTS = (aten.to.dtype, aten._to_copy.default)


def turn(gm: fx.GraphModule, node: fx.Node) -> None:
    """A sum, if it is a rotary embedding of pairs: x cos + [-b, a] sin. A cast to bfloat16 that follows is part of it."""
    found = turned(node)
    if found is None:
        return
    x, cosines, sines = found
    last, views = node, []  # what follows, up to the cast
    while len(last.users) == 1 and (reader := next(iter(last.users))).target in (*CASTS, aten.permute.default):
        last = reader
        if last.target is aten.permute.default:
            views.append(last.args[1])
        elif last.meta["val"].dtype != torch.float32:
            break
    half = last.meta["val"].dtype == torch.bfloat16
    with gm.graph.inserting_before(node):
        value = gm.graph.call_function(rotary._opoverload, (contiguous(gm, x), cosines, sines, half))
        value.meta["val"] = node.meta["val"].to(torch.bfloat16 if half else torch.float32).contiguous()
        for order in views if half else ():
            was = value.meta["val"]
            value = gm.graph.call_function(aten.permute.default, (value, order))
            value.meta["val"] = was.permute(order)
    (last if half else node).replace_all_uses_with(value)


def turned(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x and the tables of cosines and sines that the sum turns it by, all of four dimensions; None if it is another sum."""
    products: list[Any] = [n for n in node.all_input_nodes if n.target is aten.mul.Tensor]
    if len(products) != 2 or node.kwargs:
        return None
    (left, cosines), (right, sines) = (p.args for p in products)
    if not isinstance(cosines, fx.Node) or not isinstance(sines, fx.Node):
        return None
    left, right = plain(left), plain(right)
    x = source_of_pairs(right)
    if x is None or x is not left:
        return None
    tables = [t.meta["val"] for t in (cosines, sines)]
    alike = tables[0].stride() == tables[1].stride() and tables[0].shape == tables[1].shape
    wide, whole = (
        x.meta["val"].shape,
        all(t.dtype == torch.float32 and t.dim() == 4 and t.is_contiguous() for t in tables),
    )
    fits = (
        len(wide) == 4
        and all(a in (1, b) for a, b in zip(tables[0].shape, wide, strict=True))
        and tables[0].shape[3] == wide[3]
    )
    return (x, cosines, sines) if alike and whole and fits else None


def source_of_pairs(node: Any) -> fx.Node | None:
    """x, if the node is [-b, a] of the pairs (a, b) of its features."""
    if not isinstance(node, fx.Node) or node.target not in (
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.view.default,
    ):
        return None
    stack = plain(node.args[0])
    parts, dim = arguments(stack, ("tensors", "dim")) if stack.target is aten.stack.default else ((), None)
    if len(parts) != 2 or dim != -1 or parts[0].target is not aten.neg.default:
        return None
    b, a = plain(parts[0].args[0]), plain(parts[1])
    if (
        any(n.target is not operator.getitem for n in (a, b))
        or (a.args[1], b.args[1]) != (0, 1)
        or a.args[0] is not b.args[0]
    ):
        return None
    pairs = a.args[0]
    if pairs.target is not aten.unbind.int or pairs.args[1] != -1 or pairs.args[0].meta["val"].shape[-1] != 2:
        return None
    x = plain(pairs.args[0])
    x = plain(x.args[0]) if x.target in (aten.reshape.default, aten.view.default, aten.unflatten.int) else None
    return x if x is not None and x.meta["val"].shape == node.meta["val"].shape else None


def plain(node: Any) -> Any:
    """What a chain of casts begins with, for casts that lose nothing."""
    while isinstance(node, fx.Node) and node.target in CASTS and node.meta["val"].dtype == torch.float32:
        node = node.args[0]
    return node


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel does attention of such tensors."""
    features = q.shape[-1]
    alike = all(t.dtype == torch.bfloat16 and t.dim() == 4 and t.shape[-1] == features for t in (q, k, v))
    return alike and features % 2 == 0


def arguments(node: fx.Node, names: tuple[str, ...]) -> tuple[Any, ...]:
    """A call's arguments by position, None for those that are left out."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return tuple(given.get(name) for name in names)


def contiguous(gm: fx.GraphModule, x: fx.Node, order: torch.memory_format = torch.contiguous_format) -> fx.Node:
    """x where it lies in order, and otherwise a copy."""
    if x.meta["val"].is_contiguous(memory_format=order):
        return x
    fresh = gm.graph.call_function(aten.clone.default, (x,), {"memory_format": order})
    fresh.meta["val"] = x.meta["val"].contiguous(memory_format=order)
    return fresh


def swap(gm: fx.GraphModule, node: fx.Node, operator: Any, args: tuple[Any, ...]) -> None:
    fresh = gm.graph.call_function(operator._opoverload, args)
    fresh.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(fresh)
