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

from ....passes.captured_graph import CapturedGraph
from ....passes.fx_tools import aten, make_contiguous, node_arguments, replace_call
from ....passes.prune import prune_dead_code
from ... import w8a8
from .layers import LINEAR, PackedWeight, call_few_rows, call_packed_conv2d, call_packed_linear
from .operators import attention
from .rotary import call_rotary

SDPA = aten.scaled_dot_product_attention.default
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def insert_kernel_calls(graph: CapturedGraph) -> CapturedGraph:
    """The graph, calling kernels where they fit; the same tensors up to rounding."""
    gm = fx.GraphModule(graph.gm, copy.deepcopy(graph.gm.graph))
    kept: dict[str, PackedWeight] = {}
    for node in list(gm.graph.nodes):
        if node.target is w8a8.INT8_OPERATOR.default:
            call_packed_linear(gm, node, kept)
        elif node.target is w8a8.CONV2D_OPERATOR.default:
            call_packed_conv2d(gm, node, kept)
        elif node.target is LINEAR:
            call_few_rows(gm, node)
        elif node.target is SDPA:
            call_attention(gm, node)
        elif node.target is aten.add.Tensor:
            call_rotary(gm, node)
    gm.meta["packed"] = tuple(kept.values())
    return replace(graph, gm=prune_dead_code(gm))


def call_attention(gm: fx.GraphModule, node: fx.Node) -> None:
    """An attention, if it is one that the kernel does."""
    q, k, v, mask, dropout, causal, scale, grouped = node_arguments(node, SDPA_ARGUMENTS)
    values = [t.meta["val"] for t in (q, k, v)]
    if mask is not None or dropout or causal or grouped or not is_kernel_attention(*values):
        return
    scale = values[0].shape[-1] ** -0.5 if scale is None else scale
    with gm.graph.inserting_before(node):
        inside = [t if t.meta["val"].stride(-1) == 1 else make_contiguous(gm, t) for t in (q, k, v)]
        replace_call(gm, node, attention, (*inside, float(scale)))


def is_kernel_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel does attention of such tensors."""
    features = q.shape[-1]
    alike = all(t.dtype == torch.bfloat16 and t.dim() == 4 and t.shape[-1] == features for t in (q, k, v))
    return alike and features % 2 == 0
