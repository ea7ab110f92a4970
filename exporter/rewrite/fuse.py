"""Fused projections: q, k and v as one matrix product, by diffusers' own `fuse_qkv_projections`.

before  q = x Wq, k = x Wk, v = x Wv        after  q, k, v = (x [Wq Wk Wv]).chunk(3)
"""

from __future__ import annotations

from typing import Any

from .sd3_attention import FusedJointAttention

PROJECTION_NAMES = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def fuse_qkv(model: Any) -> int:
    """How many attentions were fused; 0 of a model that has none, or that diffusers cannot fuse.

    diffusers keeps the parts beside the fused matrix; they are dropped here, or they would be quantized and stored too.
    """
    from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

    if not hasattr(model, "fuse_qkv_projections"):
        return 0
    model.fuse_qkv_projections()
    fused = [
        m
        for m in model.modules()
        if getattr(m, "fused_projections", False) and (hasattr(m, "to_qkv") or hasattr(m, "to_kv"))
    ]
    for attention in fused:
        if isinstance(attention.processor, FusedJointAttnProcessor2_0):  # wrong for SD3.5: see joint.py
            attention.set_processor(FusedJointAttention())
        whole = ["to_q"] if not hasattr(attention, "to_qkv") else []
        for part in PROJECTION_NAMES:
            if hasattr(attention, part) and part not in whole:
                delattr(attention, part)
    return len(fused)
