"""The pass that puts kernels where a captured graph does what they do.

    before  o = scaled_dot_product_attention(q, k, v)
    after   o = attention(q, k, v, scale)

and so with layers (`layers.py`) and rotary embeddings (`rotary.py`). Attention in bfloat16 without a mask only: a kernel
that changed a graph's precision would do it unasked. What a kernel refuses, and why, stays with the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ....passes.captured_graph import CapturedGraph, run_passes
from ....passes.derived_weights import DerivedWeights
from ....passes.fx_tools import aten, make_contiguous, node_arguments, replace_call
from ....passes.prune import prune_dead_code
from ... import w8a8
from .layers import LINEAR, call_few_rows, call_packed_conv2d, call_packed_linear
from .operators import OPERATOR_NAMES, attention
from .refusal import Refusal, group_refusals
from .rotary import call_rotary

SDPA = aten.scaled_dot_product_attention.default
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def insert_kernel_calls(graph: CapturedGraph) -> CapturedGraph:
    """One graph alone, calling kernels where they fit; the same tensors up to rounding."""
    return run_passes(graph, (lambda gm: replace_operators(gm, DerivedWeights()),))


def replace_operators(gm: fx.GraphModule, weights: DerivedWeights) -> fx.GraphModule:
    """`gm` with calls of kernels where they fit, and in its `meta` how many of which (`kernels`), and `refusals`. `weights`
    makes the packed weights of all graphs that share theirs."""
    refused: list[tuple[fx.Node, Refusal]] = []
    for node in list(gm.graph.nodes):
        if call := KERNEL_CALLS.get(node.target):
            refused += ((node, refusal) for refusal in call(gm, node, weights))
    gm = prune_dead_code(gm)
    called = Counter(OPERATOR_NAMES[node.target] for node in gm.graph.nodes if node.target in OPERATOR_NAMES)
    gm.meta["kernels"], gm.meta["refusals"] = dict(sorted(called.items())), group_refusals(refused)
    return gm


def call_attention(gm: fx.GraphModule, node: fx.Node, weights: DerivedWeights) -> tuple[Refusal, ...]:
    """An attention, if it is one that the kernel does."""
    q, k, v, mask, dropout, causal, scale, grouped = node_arguments(node, SDPA_ARGUMENTS)
    values = [t.meta["val"] for t in (q, k, v)]
    asked = {"a mask": mask is not None, "dropout": dropout, "a causal order": causal, "heads in groups": grouped}
    extra = next((f"has {name}" for name, is_asked in asked.items() if is_asked), "")
    if obstacle := extra or find_attention_obstacle(*values):
        return (Refusal("attention", obstacle),)
    scale = values[0].shape[-1] ** -0.5 if scale is None else scale
    with gm.graph.inserting_before(node):
        inside = [t if t.meta["val"].stride(-1) == 1 else make_contiguous(gm, t) for t in (q, k, v)]
        replace_call(gm, node, attention, (*inside, float(scale)))
    return ()


def find_attention_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the kernel does no attention of such tensors, or ""."""
    if other := next((t.dtype for t in (q, k, v) if t.dtype != torch.bfloat16), None):
        return f"in {str(other).removeprefix('torch.')}, not bfloat16"
    if any(t.dim() != 4 for t in (q, k, v)):
        return "not of four dimensions"
    if len({t.shape[-1] for t in (q, k, v)}) > 1:
        return "queries, keys and values of different widths"
    return f"heads of {q.shape[-1]}, an odd width" if q.shape[-1] % 2 else ""


KERNEL_CALLS: Mapping[Any, Callable[[fx.GraphModule, fx.Node, DerivedWeights], tuple[Refusal, ...]]] = {
    w8a8.INT8_OPERATOR.default: call_packed_linear,
    w8a8.CONV2D_OPERATOR.default: call_packed_conv2d,
    LINEAR: call_few_rows,
    SDPA: call_attention,
    aten.add.Tensor: call_rotary,
}
"""Operator -> what puts a kernel in the place of a call of it, or says why not."""
