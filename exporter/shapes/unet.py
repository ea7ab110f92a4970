"""The second model's denoiser: a UNet in SD1.5's structure, trained to be guided by classifier-free guidance.

It works on the latents and captions of `flow`, and reads the frozen CLIP's last hidden states, padding included, as
`StableDiffusionPipeline` gives them: the state at the first end token says the whole caption. Captions are now and then
empty, so that there is something to guide away from. It predicts v (Salimans & Ho 2022, arXiv:2202.00512).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from . import stage
from .flow import EMPTY_SHARE, FLUX_POOL_SIZE, LOOSER_SHARE, attend_unfused, draw_pictures
from .text import WIDTH
from .world import Caption, loosen_caption

STEPS = 3250
BATCH = 32
TIMESTEPS = 840


def build_unet() -> UNet2DConditionModel:
    """Three levels of two layers, heads of 32; what adds to the skip connections starts at zero."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(32, 64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(1, 2, 3),  # diffusers' name for the number of heads
        norm_num_groups=8,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return unet


def build_scheduler() -> DDIMScheduler:
    """Cosine noise levels, v prediction, from pure noise to none.

    There are 840 training steps because DDIMScheduler goes back by `840 // steps` while its trailing timesteps lie
    `840 / steps` apart: the two agree for 1 to 8, 10, 12, 14, 15, 20, 21, 24, 28, 30 and 35 steps.
    """
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # as StableDiffusionPipeline wants it; trailing spacing has no offset
    )


@dataclass
class UNetPool:
    """Latents [N, 4, 16, 16] of pictures, ids [N, 2, 32] of two captions true of each (the second looser), ids of ""."""

    latents: torch.Tensor
    ids: torch.Tensor
    empty: torch.Tensor

    def batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 4, 16, 16] float32 and token ids [B, 32] of BATCH pictures."""
        rows = torch.from_numpy(rng.integers(len(self.latents), size=BATCH))
        looser = torch.from_numpy((rng.random(BATCH) < LOOSER_SHARE).astype(np.int64))
        empty = torch.from_numpy(rng.random(BATCH) < EMPTY_SHARE)
        ids = self.ids[rows, looser].long()
        ids[empty] = self.empty.long()
        return self.latents[rows].float(), ids


def make_unet_pool(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> UNetPool:
    """The pictures and captions of `flow.make_flux_pool`. Checkpoint: `unet_pool.pt`."""
    path = folder / "unet_pool.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    rng = np.random.default_rng((stage.SEED, 2))
    latents, ids = [], []
    for _ in range(FLUX_POOL_SIZE // 100):
        captions, z = draw_pictures(100, rng, vae)
        latents.append(z.half())
        ids.append(
            tokenize_prompts(
                tokenizer, [str(c) for pair in ((c, loosen_caption(c, rng)) for c in captions) for c in pair]
            )
        )
        if len(latents) % 100 == 0:
            print(f"pool {len(latents) * 100}/{FLUX_POOL_SIZE}", flush=True)
    pool = UNetPool(
        torch.cat(latents), torch.cat(ids).unflatten(0, (-1, 2)), tokenize_prompts(tokenizer, [str(Caption())])[0]
    )
    torch.save(pool, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return pool


def tokenize_prompts(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids [B, 32] int16, padded and cut as StableDiffusionPipeline does it."""
    length = tokenizer.model_max_length
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.int16)


def train_unet(
    folder: Path, pool: UNetPool, clip: CLIPTextModel, *, stop_at: int | None = None
) -> UNet2DConditionModel:
    """The trained UNet, float32. Checkpoint: `unet.pt`; `stop_at` ends early."""
    torch.manual_seed(stage.SEED)
    unet = build_unet()
    signal = build_scheduler().alphas_cumprod

    def step(i: int, rng: np.random.Generator) -> torch.Tensor:
        latents, ids = pool.batch(rng)
        with torch.no_grad():
            states = clip(ids).last_hidden_state
        t = (torch.arange(BATCH) + torch.rand(BATCH)) * (TIMESTEPS / BATCH)  # one in each of BATCH equal parts
        t = t.long().clamp(max=TIMESTEPS - 1)
        a, b = signal[t].sqrt().view(-1, 1, 1, 1), (1 - signal[t]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        return (predict_v(unet, a * latents + b * noise, t, states) - (a * noise - b * latents)).square().mean()

    stage.run_stage(
        folder / "unet.pt",
        unet,
        step,
        steps=STEPS,
        optimisers=optimisers(unet, 2e-3),
        hold=0.77,
        ema=0.998,
        save_every=250,
        stop_at=stop_at,
    )
    return unet.eval().requires_grad_(False)


def predict_v(unet: UNet2DConditionModel, noisy, t, states) -> torch.Tensor:
    """v, [B, 4, 16, 16] float32; matrix products in bf16."""
    plain = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend_unfused)
    with plain, torch.autocast("cpu", torch.bfloat16):
        return unet(noisy, t, states, return_dict=False)[0].float()


def optimisers(unet: UNet2DConditionModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices and convolutions inside the blocks, AdamW for embeddings, norms, biases, input and output.

    Muon takes only matrices, so it is given each kernel [O, I, h, w] as a matrix [O, I h w] on the same memory.
    """
    outer, pairs = [], []
    for name, p in unet.named_parameters():
        if "_block" in name and p.ndim > 1 and "time_emb" not in name:
            pairs.append((p, torch.nn.Parameter(p.detach().flatten(1))))
        else:
            outer.append(p)

    def lend_gradients(*_) -> None:
        for p, matrix in pairs:
            matrix.grad = p.grad.flatten(1)

    def drop_gradients(*_) -> None:
        for p, _matrix in pairs:
            p.grad = None

    muon = torch.optim.Muon([m for _, m in pairs], rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    muon.register_step_pre_hook(lend_gradients)
    muon.register_step_post_hook(drop_gradients)
    return [muon, torch.optim.AdamW(outer, rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
