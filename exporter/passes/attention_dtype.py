"""Attention in a dtype of its own.

    before  o = scaled_dot_product_attention(q, k, v)
    after   o = scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype)).to(o.dtype)

Its two products are averages over many keys, in which what single values lose in rounding cancels out; bfloat16 there
costs a denoiser that is float32 otherwise next to nothing, and is several times faster.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .captured_graph import CapturedGraph

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def cast_attention(graph: CapturedGraph, dtype: torch.dtype) -> CapturedGraph:
    """The graph with every attention of another floating dtype in this one; masks that are added become it too."""
    gm = fx.GraphModule(graph.gm, copy.deepcopy(graph.gm.graph))
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        given = node.meta["val"].dtype
        if given == dtype:
            continue
        with gm.graph.inserting_before(node):
            node.args = tuple(cast_node(gm, x, dtype) for x in node.args)
            node.kwargs = {name: cast_node(gm, x, dtype) for name, x in node.kwargs.items()}
        node.meta["val"] = node.meta["val"].to(dtype)
        with gm.graph.inserting_after(node):
            back = cast_node(gm, node, given)
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
    gm.recompile()
    return replace(graph, gm=gm)


def cast_node(gm: fx.GraphModule, x: Any, dtype: torch.dtype) -> Any:
    """x in that dtype, if it is a floating tensor of another."""
    if not isinstance(x, fx.Node) or not x.meta["val"].dtype.is_floating_point or x.meta["val"].dtype == dtype:
        return x
    fresh = gm.graph.call_function(torch.ops.aten._to_copy.default, (x,), {"dtype": dtype})
    fresh.meta["val"] = x.meta["val"].to(dtype)
    return fresh
