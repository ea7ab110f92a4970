"""Rotary embeddings, however a model writes them: x cos + [-b, a] sin of the pairs (a, b) of x."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ....passes.derived_weights import DerivedWeights
from ....passes.fx_tools import CASTS, aten, make_contiguous, node_arguments
from ....private_torch import have_equal_shapes, is_surely_equal, operator_overload
from .operators import rotary
from .refusal import Refusal

JOINS = (aten.cat.default, aten.concat.default, aten.stack.default)


def call_rotary(gm: fx.GraphModule, node: fx.Node, weights: DerivedWeights) -> tuple[Refusal, ...]:
    """A sum, if it is a rotary embedding of pairs: x cos + [-b, a] sin. A cast to bfloat16 that follows is part of it."""
    found = match_rotary(node)
    if found is None or isinstance(found, Refusal):
        return () if found is None else (found,)
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
        value = gm.graph.call_function(operator_overload(rotary), (make_contiguous(gm, x), cosines, sines, half))
        value.meta["val"] = node.meta["val"].to(torch.bfloat16 if half else torch.float32).contiguous()
        for order in views if half else ():
            was = value.meta["val"]
            value = gm.graph.call_function(aten.permute.default, (value, order))
            value.meta["val"] = was.permute(order)
    (last if half else node).replace_all_uses_with(value)
    return ()


def match_rotary(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | Refusal | None:
    """x and the tables of cosines and sines that the sum turns it by, all of four dimensions; None if it is another sum."""
    products: list[Any] = [n for n in node.all_input_nodes if n.target is aten.mul.Tensor]
    if len(products) != 2 or node.kwargs:
        return None
    (left, cosines), (right, sines) = (p.args for p in products)
    if not isinstance(cosines, fx.Node) or not isinstance(sines, fx.Node):
        return None
    left, right = skip_casts(left), skip_casts(right)
    x = match_pairs(right)
    if x is None or x is not left:
        return Refusal("rotary", "pairs that are no neighbours, or turned otherwise") if is_turned(right) else None
    if obstacle := find_table_obstacle(x.meta["val"], cosines.meta["val"], sines.meta["val"]):
        return Refusal("rotary", obstacle)
    return x, cosines, sines


def find_table_obstacle(x: Tensor, cosines: Tensor, sines: Tensor) -> str:
    """Why the kernel does not turn x by such tables, or ""."""
    tables = (cosines, sines)
    strides = zip(cosines.stride(), sines.stride(), strict=True)
    if not have_equal_shapes(cosines, sines) or not all(is_surely_equal(a, b) for a, b in strides):
        return "cosines and sines of different shapes"
    if not all(t.dtype == torch.float32 and t.dim() == 4 and t.is_contiguous() for t in tables):
        return "tables not in float32, of four dimensions and in order"
    wide = x.dim() == 4 and all(
        is_surely_equal(a, 1) or is_surely_equal(a, b) for a, b in zip(cosines.shape, x.shape, strict=True)
    )
    return "" if wide and cosines.shape[3] == x.shape[3] else "tables that do not fit its tensor"


def is_turned(node: Any) -> bool:
    """Whether it joins parts of a tensor, some of them negated: a rotary embedding of some other kind."""
    if not isinstance(node, fx.Node):
        return False
    joined = node if node.target in JOINS else skip_casts(node.args[0] if node.args else None)
    if not isinstance(joined, fx.Node) or joined.target not in JOINS:
        return False
    parts: Any = joined.args[0]
    return any(skip_casts(part).target is aten.neg.default for part in parts)


def match_pairs(node: Any) -> fx.Node | None:
    """x, if the node is [-b, a] of the pairs (a, b) of its features."""
    if not isinstance(node, fx.Node) or node.target not in (
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.view.default,
    ):
        return None
    stack = skip_casts(node.args[0])
    parts, dim = node_arguments(stack, ("tensors", "dim")) if stack.target is aten.stack.default else ((), None)
    if len(parts) != 2 or dim != -1 or parts[0].target is not aten.neg.default:
        return None
    b, a = skip_casts(parts[0].args[0]), skip_casts(parts[1])
    if (
        any(n.target is not operator.getitem for n in (a, b))
        or (a.args[1], b.args[1]) != (0, 1)
        or a.args[0] is not b.args[0]
    ):
        return None
    pairs = a.args[0]
    if pairs.target is not aten.unbind.int or pairs.args[1] != -1 or pairs.args[0].meta["val"].shape[-1] != 2:
        return None
    x = skip_casts(pairs.args[0])
    x = skip_casts(x.args[0]) if x.target in (aten.reshape.default, aten.view.default, aten.unflatten.int) else None
    return x if x is not None and have_equal_shapes(x.meta["val"], node.meta["val"]) else None


def skip_casts(node: Any) -> Any:
    """The node that a chain of casts begins with, for casts that lose nothing."""
    while isinstance(node, fx.Node) and node.target in CASTS and node.meta["val"].dtype == torch.float32:
        node = node.args[0]
    return node
