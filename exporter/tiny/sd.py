"""Stable Diffusion 1 and 2 in small: epsilon with PNDM, v-prediction with DDIM, as the real ones' configurations have it."""

from __future__ import annotations

from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from . import parts

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def build(seed: int = 0, *, prediction: str = "epsilon") -> StableDiffusionPipeline:
    """A UNet of two levels, cross attention in the first; 32 x 32 pixels are 4 x 16 x 16 latents."""
    tokenizer = parts.clip_tokenizer()
    common = {**BETAS, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": prediction}
    second = prediction == "v_prediction"
    plms = PNDMScheduler(**common, skip_prk_steps=True)
    plms.register_to_config(clip_sample=False)  # not PNDM's own: for DDIM, if that is made of this configuration
    return StableDiffusionPipeline(
        vae=parts.vae(seed + 1, scaling=0.18215),
        text_encoder=parts.clip(tokenizer, seed + 2, act="gelu" if second else "quick_gelu"),
        tokenizer=tokenizer,
        unet=unet(seed, linear=second),
        scheduler=DDIMScheduler(**common, clip_sample=False) if second else plms,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet(seed: int, *, linear: bool) -> UNet2DConditionModel:
    """16 and 32 wide; `linear` projections around attention and heads of one width are Stable Diffusion 2's."""
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4) if linear else 2,
        use_linear_projection=linear,
        norm_num_groups=4,
    )
    return parts.seed_weights(model, seed)
