"""Attention over image and text together, with fused projections: what SD3's transformers compute.

diffusers' own `FusedJointAttnProcessor2_0` (0.42.1) leaves out the norms of queries and keys, and stops where an
attention sees the image alone. SD3.5 has both, so there it would compute another model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class FusedJointAttention:
    """diffusers' `JointAttnProcessor2_0` for an `Attention` whose q, k and v are one matrix, of the image `to_qkv` and of
    the text `to_added_qkv`."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, N, D], and [B, T, D] of the text where there is one."""
        N = hidden_states.shape[1]
        q, k, v = split_qkv(attn.to_qkv(hidden_states), attn.heads, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            text = split_qkv(attn.to_added_qkv(encoder_hidden_states), attn.heads, attn.norm_added_q, attn.norm_added_k)
            q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), text, strict=True))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N + T, D]
        image = attn.to_out[1](attn.to_out[0](mixed[:, :N]))
        if encoder_hidden_states is None:
            return image
        return image, mixed[:, N:] if attn.context_pre_only else attn.to_add_out(mixed[:, N:])


def split_qkv(qkv: Tensor, heads: int, norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3 D] as q, k and v, [B, heads, N, D / heads] each; q and k through their norms, where they have some."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v
