"""Stable Diffusion XL's refiner in small: from picture to picture, the second text encoder alone, an aesthetic score."""

from __future__ import annotations

from diffusers import StableDiffusionXLImg2ImgPipeline

from . import parts, sdxl


def build(seed: int = 0) -> StableDiffusionXLImg2ImgPipeline:
    """Five numbers are added to the time: original size, crop, score."""
    tokenizer = parts.clip_tokenizer(pad="!")
    return StableDiffusionXLImg2ImgPipeline(
        vae=sdxl.vae(seed + 1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=parts.clip(tokenizer, seed + 3, projected=True, act="gelu"),
        tokenizer_2=tokenizer,
        unet=sdxl.unet(seed, text=32, added=32 + 5 * 8),
        scheduler=sdxl.scheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
