"""Stable Diffusion XL in small: two text encoders, pooled embeddings and sizes added to the time."""

from __future__ import annotations

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from . import parts


def build(seed: int = 0) -> StableDiffusionXLPipeline:
    """Text states 32 + 32 wide; 32 x 32 pixels are 4 x 16 x 16 latents; the VAE asks for float32, as the real one."""
    tokenizer, tokenizer_2 = parts.clip_tokenizer(), parts.clip_tokenizer(pad="!")
    return StableDiffusionXLPipeline(
        vae=vae(seed + 1),
        text_encoder=parts.clip(tokenizer, seed + 2),
        tokenizer=tokenizer,
        text_encoder_2=parts.clip(tokenizer_2, seed + 3, projected=True, act="gelu"),
        tokenizer_2=tokenizer_2,
        unet=unet(seed, text=64, added=32 + 6 * 8),
        scheduler=scheduler(),
    )


def vae(seed: int) -> AutoencoderKL:
    return parts.vae(seed, scaling=0.13025, force_upcast=True)


def unet(seed: int, *, text: int, added: int) -> UNet2DConditionModel:
    """16 and 32 wide, attention in the second level only. `text` is the states' width, `added` that of the pooled
    embedding and of 8 for each size."""
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        cross_attention_dim=text,
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=added,
    )
    return parts.seed_weights(model, seed)


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="leading",
        steps_offset=1,
    )
