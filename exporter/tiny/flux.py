"""FLUX in small: `dev` with its guidance embedding, `schnell` without; their real schedulers."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from . import parts


def build(seed: int = 0, *, guidance: bool = True, heads: int = 2) -> FluxPipeline:
    """1 double and 2 single blocks, `heads` x 32 wide; a token is 4 x 4 pixels; up to 64 tokens of T5."""
    tokenizer, tokenizer_2 = parts.clip_tokenizer(), parts.t5_tokenizer(max_length=64)
    return FluxPipeline(
        scheduler=scheduler(dynamic=guidance),
        vae=parts.vae(seed + 1, scaling=0.3611, shift=0.1159, quant=False),
        text_encoder=parts.clip(tokenizer, seed + 2),
        tokenizer=tokenizer,
        text_encoder_2=parts.t5(tokenizer_2, seed + 3),
        tokenizer_2=tokenizer_2,
        transformer=transformer(seed, guidance=guidance, heads=heads),
    )


def transformer(seed: int, *, guidance: bool = True, heads: int = 2) -> FluxTransformer2DModel:
    """16 channels in and out: 4 latent channels in patches of 2."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 14, 14),
    )
    return parts.seed_weights(model, seed)


def scheduler(*, dynamic: bool) -> FlowMatchEulerDiscreteScheduler:
    """As `dev` has it (`dynamic`, the shift grows with the picture), or `schnell`."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dynamic else 1.0,
        use_dynamic_shifting=dynamic,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        base_shift=0.5,
        max_shift=1.15,
    )
