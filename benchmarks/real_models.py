"""Pipelines of real sizes with random weights, for what a small model cannot show: the time and memory of each stage of an
export, compile time, forecasts. Nothing is downloaded; the pictures mean nothing.

    python benchmarks/real_models.py sd15 FOLDER [--dtype float16]   # 0.86B UNet, CLIP-L, VAE: 2 GB
    python benchmarks/real_models.py sd21 FOLDER                     # 0.87B UNet, CLIP-H, VAE: 2.5 GB
    python benchmarks/real_models.py sdxl FOLDER                     # 2.6B UNet, CLIP-L + CLIP-G, VAE: 6.9 GB
    python benchmarks/real_models.py flux2b FOLDER                   # FLUX.1-dev's widths, 3 + 6 of its 19 + 38 blocks (1.9B), T5 of 4 layers: 5.3 GB
    python benchmarks/real_models.py cogvideox FOLDER                # CogVideoX-2b's widths, 8 of its 30 blocks, T5 of 4 layers: 3.5 GB

Widths, heads, groups and vocabularies are the published configurations'; only depths are cut. Tokenizers are those of prebake's
own small models (`--tokenizer`, `--tokenizer-2`), so token ids stay within the embeddings.
"""

# pyright: reportArgumentType=false
# (annotations in diffusers are narrower than what its classes take)
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

DDPM_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET_BLOCKS: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--tokenizer", type=Path, default=Path("exporter/shapes/model/tokenizer"))
    parser.add_argument("--tokenizer-2", type=Path, default=Path("exporter/shapes/model/tokenizer_2"))
    args = parser.parse_args()
    from transformers import AutoTokenizer, CLIPTokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))  # weights are drawn in it: no float32 copy
    clip_tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer, model_max_length=77)
    pipe = MODELS[args.model](clip_tokenizer, AutoTokenizer.from_pretrained(args.tokenizer_2))
    pipe.to(dtype=getattr(torch, args.dtype)).save_pretrained(args.folder, safe_serialization=True)
    print(", ".join(f"{name} {count / 1e6:.0f}M" for name, count in count_parameters(pipe).items()))


def count_parameters(pipe: Any) -> dict[str, int]:
    """Component -> how many parameters it has."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def sd15(tokenizer: Any, tokenizer_2: Any) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=vae(0.18215, 4),
        text_encoder=clip(tokenizer, 768, 12, 12),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **UNET_BLOCKS),
        scheduler=PNDMScheduler(**DDPM_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd21(tokenizer: Any, tokenizer_2: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        **UNET_BLOCKS,
    )
    scheduler = DDIMScheduler(
        **DDPM_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae(0.18215, 4),
        text_encoder=clip(tokenizer, 1024, 23, 16, activation="gelu"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(tokenizer: Any, tokenizer_2: Any) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionXLPipeline(
        vae=vae(0.13025, 4),
        text_encoder=clip(tokenizer, 768, 12, 12),
        text_encoder_2=clip(tokenizer, 1280, 32, 20, activation="gelu", projection=1280),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**DDPM_BETAS, steps_offset=1, timestep_spacing="leading"),
    )


def flux2b(tokenizer: Any, tokenizer_2: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(0.3611, 16, shift=0.1159),
        text_encoder=clip(tokenizer, 768, 12, 12),
        tokenizer=tokenizer,
        text_encoder_2=t5(),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def cogvideox(tokenizer: Any, tokenizer_2: Any) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=30,
        attention_head_dim=64,
        num_layers=8,
        text_embed_dim=4096,
        sample_width=90,
        sample_height=60,
    )
    decoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(128, 256, 256, 512),
        latent_channels=16,
        layers_per_block=3,
        scaling_factor=1.15258426,
    )
    scheduler = CogVideoXDDIMScheduler(
        **DDPM_BETAS,
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer_2, text_encoder=t5(), vae=decoder, transformer=transformer, scheduler=scheduler
    )


MODELS = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl, "flux2b": flux2b, "cogvideox": cogvideox}


def vae(scale: float, channels: int, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        sample_size=1024,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def clip(
    tokenizer: Any, width: int, layers: int, heads: int, activation: str = "quick_gelu", projection: int | None = None
) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection or width,
        hidden_act=activation,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5() -> Any:
    """T5 v1.1 XXL with 4 of its 24 layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=4, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).to(torch.get_default_dtype()).eval()


if __name__ == "__main__":
    main()
