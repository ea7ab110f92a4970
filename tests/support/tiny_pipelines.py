"""Two of the tiny pipelines as the older tests have them: a prompt of 8 tokens, 4 steps, DDIM for Stable Diffusion."""

from __future__ import annotations

from pathlib import Path

from diffusers import DDIMScheduler

from prebake.exporter.tiny import flux, save_pipeline, sd

DEFAULTS = {
    "height": 32,
    "width": 32,
    "max_sequence_length": 8,
    "num_inference_steps": 4,
    "guidance_scale": 3.5,
}
SD_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 3.0}
OVERRIDES = ("cache.method=pab", "sampler.steps=8", "verify.cached_psnr_db=20")
"""What the fixture `tiny_artifact` changes in `flux-fast`."""
SD_OVERRIDES = (
    "cache.method=none",
    "precision.denoiser=float32",
    "precision.text_encoders=float32",
    "precision.vae=float32",
    "verify.evaluation_error=0.1",
    "verify.worst_evaluation_error=0.1",
    "verify.seeds=1",
    'verify.prompts=["a red circle"]',
)
"""What the fixture `tiny_sd_artifact` changes in `sd-fast`."""

SIDE = "{min=32,max=96,step=16}"
RANGE_OVERRIDES = (
    "cache.method=none",
    "quantize.method=none",
    "precision.denoiser=float32",
    "precision.text_encoders=float32",
    "precision.vae=float32",
    f"shapes.height={SIDE}",
    f"shapes.width={SIDE}",
    "sampler.steps=4",
    "verify.evaluation_error=0.1",
    "verify.worst_evaluation_error=0.1",
    "verify.picture_error=0.1",
    "verify.worst_picture_error=0.1",
    "verify.seeds=1",
    'verify.prompts=["a red circle"]',
)
"""What the fixture `range_artifact` changes in `flux-fast`."""


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """The FLUX pipeline as a folder that `--model` accepts."""
    return save_pipeline(flux.build(seed), folder, DEFAULTS)


def save_tiny_sd(folder: Path) -> Path:
    """The Stable Diffusion pipeline as such a folder; one evaluation a step, from the start."""
    pipe = sd.build()
    pipe.register_modules(scheduler=DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False))
    return save_pipeline(pipe, folder, SD_DEFAULTS)
