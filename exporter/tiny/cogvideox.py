"""CogVideoX in small: 9 frames of 64 x 64 pixels, its own DDIM, a VAE in three dimensions."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from . import parts


def build(seed: int = 0) -> CogVideoXPipeline:
    """9 frames are 3 of latents, 4 x 16 x 16 each: 192 tokens."""
    tokenizer = parts.t5_tokenizer(max_length=64)
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5(tokenizer, seed + 2),
        vae=vae(seed + 1),
        transformer=transformer(seed),
        scheduler=CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )


def transformer(seed: int) -> CogVideoXTransformer3DModel:
    """2 blocks, 64 wide, positions as sums of sines as in the model of two billion parameters."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    parts.seed_weights(model, seed)
    for block in model.transformer_blocks:
        parts.scale_layer(block.get_submodule("attn1.to_out.0"), 3.0)  # one token in twelve is text
    return model


def vae(seed: int) -> AutoencoderKLCogVideoX:
    """Three levels: 4 pixels a latent in each direction, and 4 frames after the first."""
    scaling = 1.15258426
    model = AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 16),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        scaling_factor=scaling,
        sample_height=64,
        sample_width=64,
    )
    parts.seed_weights(model, seed)
    parts.scale_layer(model.decoder.conv_out.conv, 0.12)
    parts.set_posterior(model.encoder.conv_out.conv, 4, 1 / scaling)
    return model
