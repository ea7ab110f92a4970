"""Rewrites: changes to the loaded model's modules, in this order, each refusing with a reason instead of doing nothing.

`refuse_hooked` runs before anything is touched. Fusing comes before quantizing, so that one int8 matrix with one scale
table stands for q, k and v. (`fold` and `prune` rewrite captured graphs, not modules: see `capture.PASSES`.)
"""

from __future__ import annotations

from typing import Any

from .fuse import fuse_qkv
from .hooked import refuse_hooked
from .quantize import quantize

Layers = dict[str, tuple[str, str]]
"""Layer name -> (treatment, reason), for `inspect`."""


def rewrite(pipe: Any, recipe: Any) -> Layers:
    """Applies the recipe's `fuse` and `quantize` tables to `pipe` in place; returns what happened to each Linear."""
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        refuse_hooked(name, getattr(pipe, name))
    if recipe.fuse.qkv:
        fuse_qkv("transformer", pipe.transformer, key="fuse.qkv")
    if recipe.fuse.vae_qkv:
        fuse_qkv("vae", pipe.vae, key="fuse.vae_qkv")
    return quantize(pipe.transformer, recipe.quantize, pipe.transformer.inner_dim)
