"""Rotary embeddings, however a model writes them: x cos + [-b, a] sin of the pairs (a, b) of x."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ....passes.fx_tools import CASTS, aten, make_contiguous, node_arguments
from ....private_torch import operator_overload
from .operators import rotary


def call_rotary(gm: fx.GraphModule, node: fx.Node) -> None:
    """A sum, if it is a rotary embedding of pairs: x cos + [-b, a] sin. A cast to bfloat16 that follows is part of it."""
    found = match_rotary(node)
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
        value = gm.graph.call_function(operator_overload(rotary), (make_contiguous(gm, x), cosines, sines, half))
        value.meta["val"] = node.meta["val"].to(torch.bfloat16 if half else torch.float32).contiguous()
        for order in views if half else ():
            was = value.meta["val"]
            value = gm.graph.call_function(aten.permute.default, (value, order))
            value.meta["val"] = was.permute(order)
    (last if half else node).replace_all_uses_with(value)


def match_rotary(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
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
    return x if x is not None and x.meta["val"].shape == node.meta["val"].shape else None


def skip_casts(node: Any) -> Any:
    """The node that a chain of casts begins with, for casts that lose nothing."""
    while isinstance(node, fx.Node) and node.target in CASTS and node.meta["val"].dtype == torch.float32:
        node = node.args[0]
    return node
