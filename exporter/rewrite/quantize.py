"""int8 and fp8 dynamic: weights of 8 bits with a scale per row, activations quantized per token as they come, by the backend.

Which Linear is quantized goes by its kind (attention and feed-forward yes; modulation, embeddings and the final
projection no: they are small, run on one row, or carry the whole signal) and by its size against the model's width. So
does which convolution, where the recipe asks for them: a UNet's first and last are its embedding and final projection.
The filter is that of diffusion-fast and flux-fast, said by role instead of by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ...runtime.errors import ExportError
from ..lower.w8a8 import is_square_conv

ROLE_PATTERNS = (
    (re.compile(r"(^|\.)norm\w*\.linear(_\d)?$|(^|\.)norm_out\.|\.time_emb_proj$"), "modulation"),
    (re.compile(r"embed"), "embedding"),
    (re.compile(r"^conv_in$"), "embedding"),
    (re.compile(r"^proj_out$|^conv_out$"), "final projection"),
    (re.compile(r"\.conv\d?$|\.conv_shortcut$"), "convolution"),
    (
        re.compile(r"\.attn\d?\.|\.attentions\.\d+\.proj_(in|out)$|\.to_(q|k|v|qkv|kv|out|add_out|added_qkv)(\.\d)?$"),
        "attention",
    ),
    (re.compile(r"\.ff\w*\.|\.proj_mlp$|_blocks\.\d+\.proj_out$"), "feed-forward"),
)
QUANTIZED_ROLES = ("attention", "feed-forward", "convolution")


def layer_role(name: str) -> str:
    """A layer's role in the model, by its place: modulation, embedding, final projection, convolution, attention, feed-forward,
    other."""
    return next((k for pattern, k in ROLE_PATTERNS if pattern.search(name)), "other")


def choose_treatment(name: str, layer: nn.Linear | nn.Conv2d, config: Any, width: int) -> tuple[str, str]:
    """("int8", "fp8" or "kept", the reason in a few words) for one layer of a model of inner width `width`."""
    role = layer_role(name)
    if role not in QUANTIZED_ROLES:
        return "kept", role
    if any(re.search(p, name) for p in config.exclude):
        return "kept", "quantize.exclude"
    if not any(re.search(p, name) for p in config.include):
        return "kept", "not in quantize.include"
    if isinstance(layer, nn.Conv2d):
        sizes = layer.in_channels, layer.out_channels
        if not is_square_conv(layer):
            return "kept", f"{role}, not square or in groups"
    else:
        sizes = layer.in_features, layer.out_features
    smallest, said = config.min_width_ratio * width, f"{role}, {sizes[0]}x{sizes[1]}"
    if min(sizes) < smallest:
        return "kept", f"{said} is smaller than {smallest:g}"
    return config.treatment, said


def quantize_model(
    model: nn.Module, config: Any, width: int, quantized: Callable[[nn.Module, set[str]], None]
) -> dict[str, tuple[str, str]]:
    """Quantizes `model` in place; returns every Linear's treatment, and every convolution's where the recipe asks for them.
    `quantized` is the backend's. Raises ExportError when no layer qualifies."""
    types = (nn.Linear, nn.Conv2d) if config.quantizes_convolutions else (nn.Linear,)
    found: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, types)}
    if config.method == "none":
        return dict.fromkeys(found, ("kept", "quantize.method is none"))
    layers = {name: choose_treatment(name, m, config, width) for name, m in found.items()}
    chosen = {name for name, (what, _) in layers.items() if what != "kept"}
    if not chosen:
        reasons = sorted({why for _, why in layers.values()})
        raise ExportError(
            f"quantize.method {config.method!r} fits none of the model's {len(layers)} Linear layers ({'; '.join(reasons[:4])}); "
            "relax quantize.include, exclude or min_width_ratio, or set quantize.method=none"
        )
    quantized(model, chosen)
    return layers
