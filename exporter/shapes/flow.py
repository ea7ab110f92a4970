"""The FLUX transformer: trained as a rectified flow on latents, then distilled so that its guidance input is real.

First stage: guidance input 1, a caption that is now and then empty. Second stage: the first one's weights are teacher and
start; the student learns, in one evaluation and for a guidance input g in 1..5, what classifier-free guidance of scale
`guidance_weight(g)` makes of the teacher (Meng et al. 2023, arXiv:2210.03142, as in FLUX.1-dev).
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

from . import stage
from .text import T5_TOKENS, WIDTH, Encoders
from .world import Caption, loosen_caption, place_scene, render_scene, sample_caption

FLUX_POOL_SIZE = 60_000
BASE_STEPS = 9000
DISTIL_STEPS = 1000
BATCH = 48
LOOSER_SHARE = 0.15  # of captions, looser than what the scene was placed for
EMPTY_SHARE = 0.1  # of captions, so that there is something to guide away from


def guidance_weight(guidance):
    """The classifier-free scale that a guidance input stands for."""
    return 1 + 0.8 * (guidance - 1)


def build_transformer() -> FluxTransformer2DModel:
    """2 double and 4 single blocks, 4 heads of 32; modulation and output start at zero."""
    flux = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    for name, module in flux.named_modules():
        if isinstance(module, torch.nn.Linear) and (".norm" in name or "norm_out" in name or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return flux


@dataclass
class FluxPool:
    """Latents [N, 64, 16] of pictures, each with two encodings of captions that are true of it, and the empty caption's.

    `pooled` [N, 2, D] and `tokens` [N, 2, 16, D]: the caption that the scene was placed for, and a looser one.
    """

    latents: torch.Tensor
    pooled: torch.Tensor
    tokens: torch.Tensor
    empty: tuple[torch.Tensor, torch.Tensor]

    def batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, pooled and tokens of BATCH pictures, float32."""
        rows = torch.from_numpy(rng.integers(len(self.latents), size=BATCH))
        looser = torch.from_numpy((rng.random(BATCH) < LOOSER_SHARE).astype(np.int64))
        empty = torch.from_numpy(rng.random(BATCH) < EMPTY_SHARE)
        pooled, tokens = self.pooled[rows, looser].float(), self.tokens[rows, looser].float()
        pooled[empty], tokens[empty] = self.empty
        return self.latents[rows].float(), pooled, tokens


def make_flux_pool(folder: Path, vae: AutoencoderKL, encoders: Encoders) -> FluxPool:
    """POOL pictures through the codec and their captions through the encoders. Checkpoint: `pool.pt`."""
    path = folder / "pool.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    rng = np.random.default_rng((stage.SEED, 2))
    latents, pooled, tokens = [], [], []
    with torch.inference_mode():
        for _ in range(FLUX_POOL_SIZE // 100):
            captions, z = draw_pictures(100, rng, vae)
            latents.append(FluxPipeline._pack_latents(z, *z.shape).half())
            p, t = encoders([str(c) for pair in ((c, loosen_caption(c, rng)) for c in captions) for c in pair])
            pooled.append(p.view(100, 2, WIDTH).half())
            tokens.append(t.view(100, 2, T5_TOKENS, WIDTH).half())
            if len(latents) % 100 == 0:
                print(f"pool {len(latents) * 100}/{FLUX_POOL_SIZE}", flush=True)
        p, t = encoders([str(Caption())])
    pool = FluxPool(torch.cat(latents), torch.cat(pooled), torch.cat(tokens), (p[0].clone(), t[0].clone()))
    torch.save(pool, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return pool


@torch.inference_mode()
def draw_pictures(n: int, rng: np.random.Generator, vae: AutoencoderKL) -> tuple[list[Caption], torch.Tensor]:
    """Captions, 45% of them loosened, and the latents [n, 4, 16, 16] of a picture for each; mean 0, deviation 1."""
    captions = [sample_caption(rng) for _ in range(n)]
    captions = [c if rng.random() < 0.55 else loosen_caption(c, rng) for c in captions]
    pictures = np.stack([render_scene(place_scene(c, rng)) for c in captions])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.encode(x).latent_dist.mean.float()
    return captions, (z - vae.config.shift_factor) * vae.config.scaling_factor


def train_transformer(folder: Path, pool: FluxPool) -> FluxTransformer2DModel:
    """The trained transformer. Checkpoints: `base.pt`, `distil.pt`."""
    torch.manual_seed(stage.SEED)
    flux = build_transformer()

    def base(i: int, rng: np.random.Generator) -> torch.Tensor:
        latents, pooled, tokens = pool.batch(rng)
        noisy, sigma, noise = _noise_latents(latents)
        velocity = predict_velocity(flux, noisy, sigma, torch.ones(BATCH), pooled, tokens)
        return (velocity - (noise - latents)).square().mean()

    stage.run_stage(
        folder / "base.pt", flux, base, steps=BASE_STEPS, optimisers=optimisers(flux, 2e-3), hold=0.445, ema=0.998
    )

    teacher = copy.deepcopy(flux).eval().requires_grad_(False)

    def distil(i: int, rng: np.random.Generator) -> torch.Tensor:
        latents, pooled, tokens = pool.batch(rng)
        noisy, sigma, _ = _noise_latents(latents)
        guidance = torch.where(torch.rand(BATCH) < 0.5, 1 + 4 * torch.rand(BATCH), 3 + torch.rand(BATCH))
        ones = torch.ones(BATCH)
        with torch.no_grad():
            cond = predict_velocity(teacher, noisy, sigma, ones, pooled, tokens)
            empty_pooled, empty_tokens = (e.float().expand(BATCH, *e.shape) for e in pool.empty)
            uncond = predict_velocity(teacher, noisy, sigma, ones, empty_pooled, empty_tokens)
            target = uncond + guidance_weight(guidance)[:, None, None] * (cond - uncond)
        velocity = predict_velocity(flux, noisy, sigma, guidance, pooled, tokens)
        return (velocity - target).square().mean()

    stage.run_stage(
        folder / "distil.pt", flux, distil, steps=DISTIL_STEPS, optimisers=optimisers(flux, 7e-4), hold=0.2, ema=0.99
    )
    return flux.eval().requires_grad_(False)


def optimisers(flux: FluxTransformer2DModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, modulation, biases and output."""
    inner, outer = [], []
    for name, p in flux.named_parameters():
        in_block = "transformer_blocks." in name and p.ndim == 2 and ".norm" not in name
        (inner if in_block else outer).append(p)
    return [
        torch.optim.Muon(inner, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def predict_velocity(flux, noisy, sigma, guidance, pooled, tokens) -> torch.Tensor:
    """The velocity, [B, 64, 16] float32; matrix products in bf16."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(64, 3)
    plain = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend_unfused)
    with plain, torch.autocast("cpu", torch.bfloat16):
        return flux(
            hidden_states=noisy,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=guidance,
            img_ids=places,
            txt_ids=torch.zeros(T5_TOKENS, 3),
            return_dict=False,
        )[0].float()


def attend_unfused(query, key, value, **_) -> torch.Tensor:
    """Attention as two products: at 80 tokens a third faster to train on a CPU than the fused kernel's backward."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)


def _noise_latents(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents on the way to noise, their sigmas [B] (logit-normal about 0.6), and the noise."""
    sigma = torch.sigmoid(torch.randn(len(latents)) + 0.4)
    noise = torch.randn_like(latents)
    s = sigma[:, None, None]
    return (1 - s) * latents + s * noise, sigma, noise
