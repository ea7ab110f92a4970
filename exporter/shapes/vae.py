"""The picture codec: an AutoencoderKL of 4x4 pixels to 4 channels, trained here in two stages.

Out: `vae.config.shift_factor` and `scaling_factor` set so that latents have mean 0 and deviation 1, as `flow` expects.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from . import stage
from .world import loosen_caption, place_scene, render_scene, sample_caption

VAE_STEPS = 5200
DECODER_STEPS = 1900
VAE_POOL_SIZE = 8000
LATENT_NOISE = 0.07  # of a latent's deviation: what a sampler's error looks like to the decoder


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train_vae(folder: Path) -> AutoencoderKL:
    """The trained codec. Checkpoints: `vae.pt`, `decoder.pt`."""
    torch.manual_seed(stage.SEED)
    vae = build_vae()
    pictures, boxes = _draw_pool(np.random.default_rng((stage.SEED, 1)))

    def batch(rng: np.random.Generator) -> torch.Tensor:
        """Three in four: 16 crops of 32x32 round an object; else 6 whole pictures. [B, 3, H, W] in -1..1."""
        if rng.random() < 0.25:
            chosen = pictures[torch.from_numpy(rng.integers(VAE_POOL_SIZE, size=6))]
        else:
            rows = rng.integers(VAE_POOL_SIZE, size=16)
            corners = np.clip(boxes[rows] - 16 + rng.integers(-8, 9, (16, 2)), 0, 32)
            crops = [pictures[r, :, y : y + 32, x : x + 32] for r, (x, y) in zip(rows, corners, strict=True)]
            chosen = torch.stack(crops)
        return chosen.float() / 127.5 - 1

    def whole(i: int, rng: np.random.Generator) -> torch.Tensor:
        x = batch(rng)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(x).latent_dist
            y = vae.decode(latents.sample()).sample
        return _loss(y.float(), x) + 1e-3 * (latents.kl().float() / latents.mean[0].numel()).mean()

    adam = torch.optim.AdamW(vae.parameters(), 2.5e-3, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    stage.run_stage(folder / "vae.pt", vae, whole, steps=VAE_STEPS, optimisers=[adam], hold=0.4, ema=0.995)

    vae.encoder.requires_grad_(False)
    with torch.no_grad():
        latents = vae.encode(pictures[:512].float() / 127.5 - 1).latent_dist.mean
    mean, deviation = latents.mean().item(), latents.std().item()

    def decoder(i: int, rng: np.random.Generator) -> torch.Tensor:
        x = batch(rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean
            y = vae.decode(z + LATENT_NOISE * deviation * torch.randn_like(z)).sample
        chroma = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        return _loss(y.float(), x, 1 + 2 * F.max_pool2d((chroma > 0.2).float(), 5, 1, 2))

    adam = torch.optim.AdamW(vae.decoder.parameters(), 1.5e-3, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    stage.run_stage(folder / "decoder.pt", vae, decoder, steps=DECODER_STEPS, optimisers=[adam], hold=0.3, ema=0.995)
    vae.register_to_config(shift_factor=round(mean, 6), scaling_factor=round(1 / deviation, 6))
    return vae.eval().requires_grad_(False)


def _draw_pool(rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """Pictures [N, 3, 64, 64] uint8 and the centre (x, y) of one object in each."""
    pictures, centres = np.empty((VAE_POOL_SIZE, 64, 64, 3), np.uint8), np.empty((VAE_POOL_SIZE, 2), np.int64)
    for i in range(VAE_POOL_SIZE):
        scene = place_scene(loosen_caption(sample_caption(rng), rng), rng)
        pictures[i] = render_scene(scene) * 255 + 0.5
        thing = scene.things[rng.integers(len(scene.things))]
        centres[i] = thing.x, thing.y
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), centres


def _loss(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """L1 + L2 + L1 of the gradients."""
    d = (y - x) * weight
    return d.abs().mean() + (d * (y - x)).mean() + d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
