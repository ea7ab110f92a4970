"""Small random pipelines, seeded, saved as any pipeline is: for every test that needs structure and not pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ("a", "large", "small", "red", "blue", "circle", "square", "left", "of", "on", "white")
VOCABULARY = 4 + len(WORDS)
DEFAULTS = """[defaults]
height = 32
width = 32
max_sequence_length = 8
num_inference_steps = 4
guidance_scale = 3.5
"""
SD_DEFAULTS = """[defaults]
num_inference_steps = 4
guidance_scale = 3.0
"""
OVERRIDES = ("cache.method=pab", "sampler.steps=8", "verify.psnr_db=30", "verify.cached_psnr_db=20")
"""What the fixture `tiny_artifact` changes in `flux-fast`."""
SD_OVERRIDES = (
    "cache.method=none",
    "precision.denoiser=float32",
    "precision.text_encoders=float32",
    "precision.vae=float32",
    "verify.psnr_db=80",
    "verify.seeds=1",
    'verify.prompts=["a red circle"]',
)
"""What the fixture `tiny_sd_artifact` changes in `sd-fast`."""


def tokenizer(max_length: int, start: str | None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends with </s> and, if asked, starts with `start`."""
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    vocabulary = {w: i for i, w in enumerate((*special, *WORDS))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single=f"{start} $A </s>" if start else "$A </s>", special_tokens=[("</s>", 1), ("<s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=max_length,
    )


def tiny_vae(*, shift_factor: float | None = None) -> AutoencoderKL:
    """Two levels, so 2 pixels a latent; 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.2,
        shift_factor=shift_factor,
    )


def tiny_clip() -> CLIPTextModel:
    """One layer, 32 wide, 16 tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=3,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def tiny_pipeline(seed: int = 0, *, heads: int = 2, guidance: bool = True) -> FluxPipeline:
    """1 double and 2 single blocks, `heads` x 32 wide, 8x8 tokens of 32x32 pixels at 2x VAE reduction... random weights."""
    torch.manual_seed(seed)
    width = 32 * heads
    transformer = FluxTransformer2DModel(
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
    assert transformer.inner_dim == width
    vae, clip = tiny_vae(shift_factor=0.1), tiny_clip()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer(16, "<s>"),
        text_encoder_2=t5,
        tokenizer_2=tokenizer(8, None),
        transformer=transformer,
    )


def tiny_sd_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A UNet of two levels, 8 and 16 wide, cross attention in the first; 32x32 pixels are 4x16x16 latents."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(),
        tokenizer=tokenizer(16, "<s>"),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_tiny(folder: Path, **kwargs) -> Path:
    """The FLUX pipeline as a folder that `--model` accepts."""
    return save(tiny_pipeline(**kwargs), folder, DEFAULTS)


def save_tiny_sd(folder: Path, **kwargs) -> Path:
    """The Stable Diffusion pipeline as such a folder."""
    return save(tiny_sd_pipeline(**kwargs), folder, SD_DEFAULTS)


def save(pipe: DiffusionPipeline, folder: Path, defaults: str) -> Path:
    pipe.save_pretrained(folder)
    (folder / "prebake.toml").write_text(defaults, "utf-8")
    return folder
