"""Stable Diffusion 3.5 in small: three text encoders, joint attention, a second attention in the first block."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from . import parts


def build(seed: int = 0) -> StableDiffusion3Pipeline:
    """CLIP states, 32 + 32 wide, are padded to T5's 96; 32 x 32 pixels are 64 tokens."""
    tokenizer, tokenizer_2 = parts.clip_tokenizer(), parts.clip_tokenizer(pad="!")
    tokenizer_3 = parts.t5_tokenizer(max_length=64)
    return StableDiffusion3Pipeline(
        transformer=transformer(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(seed + 1, scaling=1.5305, shift=0.0609, quant=False),
        text_encoder=parts.clip(tokenizer, seed + 2, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=parts.clip(tokenizer_2, seed + 3, projected=True, act="gelu"),
        tokenizer_2=tokenizer_2,
        text_encoder_3=parts.t5(tokenizer_3, seed + 4, width=96),
        tokenizer_3=tokenizer_3,
    )


def transformer(seed: int) -> SD3Transformer2DModel:
    """2 blocks, 64 wide; queries and keys are normalized, as in 3.5."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=96,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return parts.seed_weights(model, seed)
