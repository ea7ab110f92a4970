"""Dead code removal with prebake's own notion of purity.

    before  attn = sdpa(q, k, v); drop = dropout(attn); out = combine(slot)     return out
    after   out = combine(slot)                                                 return out

FX and Inductor keep `scaled_dot_product_attention`, `dropout` (random, hence "impure") and `_assert_tensor_metadata`,
and with them everything that feeds them: unpruned, a variant whose attentions are all reused runs all its attentions.
The captured graph is functional, so only placeholders and the output have effects.
"""

from __future__ import annotations

from torch import fx


def prune_dead_code(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` without nodes that no output reads, and without the parameters that these alone read."""
    changed = gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    drop_unused_tensors(gm)
    if changed:
        gm.graph.lint()
        gm.recompile()
    return gm


def drop_unused_tensors(gm: fx.GraphModule) -> None:
    """Deletes parameters and buffers that no node reads, or the skip variants would carry all weights."""
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    held = [n for n, _ in gm.named_parameters(remove_duplicate=False)] + [
        n for n, _ in gm.named_buffers(remove_duplicate=False)
    ]
    for name in held:
        if name not in used:
            path, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(path), leaf)
    gm.delete_all_unused_submodules()
