"""The denoisers that `gpu.py` times: published configurations, random weights, in a pipeline whose other parts are tiny.

What is timed is the denoiser at the published number of tokens. The tiny VAE's pixels are larger than the real one's, so
the picture's size in pixels, which nothing here depends on, is not the published one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

FLUX_CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
"""transformer/config.json of black-forest-labs/FLUX.1-dev and FLUX.1-schnell, but for `guidance_embeds`."""
SDXL_CONFIG = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""unet/config.json of stabilityai/stable-diffusion-xl-base-1.0."""
POOLED_WIDTH = 1280
"""`projection_dim` of its second text encoder: what the UNet's 2,816 hold besides six numbers of 256 features each."""
COGVIDEOX_CONFIG = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 42,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "use_rotary_positional_embeddings": True,
}
"""transformer/config.json of THUDM/CogVideoX-5b."""


@dataclass(frozen=True)
class GpuModel:
    """`shrink_model` is the pipeline of `exporter/tiny` that holds the denoiser, `latents` its height and width in latents, for
    `tokens` of text and `frames` of a video. `masks` are a cache's, by the number of steps."""

    name: str
    tiny: str
    config: Mapping[str, Any]
    latents: tuple[int, int]
    steps: int
    tokens: int = 77
    frames: int = 1
    masks: str = "1111(001)"
    caches: tuple[str, ...] = ("off", "mask", "pab")
    recipe: str = "flux-fast"
    peers: tuple[str, ...] = field(default=("eager", "compile"))


GPU_MODELS = {
    m.name: m
    for m in (
        GpuModel(
            "flux-dev",
            "flux",
            {**FLUX_CONFIG, "guidance_embeds": True},
            (128, 128),
            28,
            tokens=512,
            peers=("eager", "compile", "flux-fast"),
        ),
        GpuModel(
            "flux-schnell",
            "flux-schnell",
            {**FLUX_CONFIG, "guidance_embeds": False},
            (128, 128),
            4,
            tokens=256,
            masks="1(01)",
            peers=("eager", "compile", "flux-fast"),
        ),
        GpuModel(
            "sdxl", "sdxl", SDXL_CONFIG, (128, 128), 50, caches=("off", "mask", "pab", "deepcache"), recipe="sdxl-fast"
        ),
        GpuModel(
            "cogvideox-5b", "cogvideox", COGVIDEOX_CONFIG, (60, 90), 50, tokens=226, frames=49, recipe="cogvideox-fast"
        ),
    )
}


def shrink_model(model: GpuModel) -> GpuModel:
    """The same with the tiny pipeline's own denoiser, for a run on the CPU that only shows that everything runs: all caches of
    the first model, and of the others the last."""
    steps = min(model.steps, 6)
    caches = model.caches if model.name == "flux-dev" else ("off", model.caches[-1])
    model = replace(model, caches=caches)
    if model.tiny == "cogvideox":
        return replace(model, config={}, latents=(16, 16), steps=steps, tokens=16, frames=9, masks="1(01)")
    return replace(model, config={}, latents=(16, 16), steps=steps, tokens=16, masks="1(01)")


def build_pipeline(model: GpuModel, device: torch.device, dtype: torch.dtype) -> Any:
    """The tiny pipeline with the model's denoiser in it, on the device in that dtype."""
    from prebake.exporter.tiny import build_tiny_pipeline

    pipe = build_tiny_pipeline(model.tiny)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    own = getattr(pipe, name)
    if model.config:
        pipe.register_modules(**{name: random_module(type(own), model.config, device, dtype)})
        if "projection_class_embeddings_input_dim" in model.config:
            pipe.text_encoder_2.config.projection_dim = POOLED_WIDTH  # the tiny one's own says how wide examples are
    else:
        nn.Module.to(own, device, dtype)  # diffusers' own `to` warns of dtypes
    return pipe


def random_module(cls: Any, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A denoiser with random weights that keep activations of order one, made where they will lie: 12 billion drawn on a CPU
    would take minutes."""
    module = meta_module(cls, config).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                deviation = 1 / math.sqrt(parameter[0].numel())
                parameter.normal_(0, deviation, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval()


def meta_module(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """The denoiser without memory. Raises RuntimeError for one with buffers, which would have to be computed."""
    with torch.device("meta"):
        module = cls(**config)
    if found := [name for name, _ in module.named_buffers()]:
        raise RuntimeError(f"{cls.__name__}: expected parameters alone, it has the buffer {found[0]!r}")
    return module


def model_size(model: GpuModel, family: Any, pipe: Any) -> Any:
    """The family's `Size`, in the tiny VAE's pixels."""
    factor = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
    height, width = (side * factor for side in model.latents)
    return family.Size(height, width, model.tokens, model.frames)


def model_cache(model: GpuModel, name: str) -> Any:
    """The recipe's cache table by a short name. `mask` is what the recipe's `auto` falls back on without a calibration, which
    random weights cannot have: the output along the line through the last two computed, or the last one again."""
    from prebake.exporter.caches import DeepCache, Mask, NoCache, PyramidAttentionBroadcast

    if name == "off":
        return NoCache()
    if name == "mask":
        return Mask(mask=model.masks, order=int(model.masks.startswith("11")), site="output")
    if name == "pab":
        return PyramidAttentionBroadcast(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000)
        )
    return DeepCache(cache_interval=3)
