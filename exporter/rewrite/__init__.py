"""Rewrites: changes to the loaded model's modules, in this order, each refusing with a reason instead of doing nothing.

`refuse_hooked` runs before anything is touched. Fusing comes before quantizing, so that one int8 matrix with one scale
table stands for q, k and v. (`fold` and `prune` rewrite captured graphs, not modules: see `capture.PASSES`.)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..progress import Progress
from .fuse import fuse_qkv
from .quantize import quantize_model
from .quantize_components import quantize_text_encoders, quantize_vae
from .refuse_hooks import refuse_hooked

if TYPE_CHECKING:
    from ..lower import Backend

DENOISER_COMPONENTS = ("transformer", "unet", "prior", "dit")
"""What diffusers' pipelines call the part that is run at every step."""
LayerTreatments = dict[str, tuple[str, str]]
"""Layer name -> (treatment, reason), for `inspect`."""


def rewrite_pipeline(pipe: Any, recipe: Any, backend: Backend, progress: Progress | None = None) -> LayerTreatments:
    """Applies the recipe's `fuse` and `quantize` tables to `pipe` in place; returns what happened to each Linear of the
    denoiser, and to each layer of other components that it quantizes, and notes how many attentions were fused."""
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            refuse_hooked(name, component)
    if recipe.fuse.vae_qkv:
        fuse_component("fuse.vae_qkv", "vae", pipe.vae, progress)
    name, denoiser = next((n, pipe.components[n]) for n in DENOISER_COMPONENTS if n in pipe.components)
    others = {**quantize_text_encoders(pipe, recipe, backend), **quantize_vae(pipe, recipe)}
    return {**rewrite_denoiser(name, denoiser, recipe, backend, progress), **others}


def rewrite_denoiser(
    name: str, denoiser: Any, recipe: Any, backend: Backend, progress: Progress | None = None
) -> LayerTreatments:
    """Applies `fuse` and `quantize` to the denoiser alone, whose name in its pipeline is `name`."""
    refuse_hooked(name, denoiser)
    if recipe.fuse.qkv:
        fuse_component("fuse.qkv", name, denoiser, progress)
    if name == "unet" and backend.CHANNELS_LAST:
        denoiser.to(memory_format=torch.channels_last)
    quantized = partial(backend.quantize_layers, recipe=recipe)
    return quantize_model(denoiser, recipe.quantize, inner_width(denoiser), quantized)


def fuse_component(key: str, name: str, component: Any, progress: Progress | None) -> None:
    """Fuses where there is something to fuse, and says how many attentions of the component have one product for queries,
    keys and values now, or that there is nothing: a recipe may be for every family."""
    count = fuse_qkv(component)
    if progress:
        said = f"{count} attention{'s' * (count > 1)} fused in the {name}"
        progress.note(f"{key}: {said if count else f'nothing to fuse in the {name} ({type(component).__name__})'}")


def inner_width(denoiser: Any) -> int:
    """A transformer's width; of a UNet, which widens downwards, the least: that of its first level."""
    config = denoiser.config
    if hasattr(config, "block_out_channels"):
        return min(config.block_out_channels)
    if width := getattr(denoiser, "inner_dim", None) or config.get("hidden_size"):
        return width
    return config.num_attention_heads * config.attention_head_dim
