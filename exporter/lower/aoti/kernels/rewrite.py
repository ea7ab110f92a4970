"""Where a captured graph does what a kernel does, it calls the kernel.

    before  o = scaled_dot_product_attention(q, k, v)
    after   o = attention(q, k, v, scale)

and so with products (`products.py`) and rotary embeddings (`turns.py`). Attention in bfloat16 without a mask only: a kernel
that changed a graph's precision would do it unasked.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, fx

from ....passes.captured_graph import Captured
from ....passes.fx_tools import arguments, aten, contiguous, swap
from ....passes.prune import prune
from ... import w8a8
from .layers import LINEAR, Packed, convolve, multiply, read_once
from .operators import attention
from .rotary import turn

SDPA = aten.scaled_dot_product_attention.default
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


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


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel does attention of such tensors."""
    features = q.shape[-1]
    alike = all(t.dtype == torch.bfloat16 and t.dim() == 4 and t.shape[-1] == features for t in (q, k, v))
    return alike and features % 2 == 0
