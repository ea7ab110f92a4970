"""Tiny pipelines that have no family file, of diffusers' and transformers' own classes, for tests of `attach`.

Weights are drawn by torch from a seed: these pipelines are compared with themselves in one process only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from prebake.exporter.package import folder as package
from prebake.exporter.package.folder import StoredWeights
from prebake.exporter.package.manifest import describe_artifact
from prebake.exporter.recipe.resolve import Recipe, Shapes
from prebake.exporter.verify.closeness import relative_error
from prebake.runtime.artifact import Artifact, read_plans
from prebake.runtime.replay import tabulate_plan
from support.captured_pipeline import CPU, bound, captured, prepared

PROMPT, OTHER_PROMPT, LONGER_PROMPT = "a red circle", "a blue square", "a large red circle on white"


WORDS = ("a", "large", "small", "red", "blue", "circle", "square", "left", "of", "on", "white")
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")
VOCABULARY = len(SPECIAL) + len(WORDS)


def tokenizer(max_length: int, start: str | None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends with </s> and, if asked, starts with `start`."""
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
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


def gemma() -> Gemma2Model:
    """Two layers, 32 wide."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            bos_token_id=3,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def umt5() -> UMT5EncoderModel:
    """One layer, 32 wide."""
    return UMT5EncoderModel(UMT5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))


def eightfold_vae() -> AutoencoderKL:
    """Four levels, so 8 pixels a latent; 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.2,
        shift_factor=0.1,
    )


def sana() -> SanaPipeline:
    """Guidance in one batch of two; an integer mask that the model turns into a bias; a second-order solver."""
    return SanaPipeline(
        tokenizer=tokenizer(512, "<s>"),
        text_encoder=gemma(),
        vae=AutoencoderDC(
            latent_channels=4,
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def lumina2() -> Lumina2Pipeline:
    """Guidance in two calls; a mask whose sum the model reads in Python; timesteps that run from 0 to 1."""
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 4, 4),
            axes_lens=(64, 16, 16),
            cap_feat_dim=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=eightfold_vae(),
        text_encoder=gemma(),
        tokenizer=tokenizer(64, "<s>"),
    )


def wan() -> WanPipeline:
    """Video; guidance in two calls; integer timesteps; a solver that looks back."""
    return WanPipeline(
        tokenizer=tokenizer(16, None),
        text_encoder=umt5(),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.2] * 4
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    )


def aura_flow() -> AuraFlowPipeline:
    """Guidance in one batch of two; the first argument by position; timesteps made from Python numbers."""
    return AuraFlowPipeline(
        tokenizer=tokenizer(16, None),
        text_encoder=umt5(),
        vae=eightfold_vae(),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.7),
    )


def qwen_image() -> QwenImagePipeline:
    """Guidance in two calls of different lengths; shapes as lists of tuples of integers."""
    rope = {"type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": rope,
            "bos_token_id": 3,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=2,
        video_token_id=2,
        vision_start_token_id=2,
        vision_end_token_id=2,
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.2] * 4
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(1024, None),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 4, 4),
        ),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "sana": sana,
    "lumina2": lumina2,
    "wan": wan,
    "aura_flow": aura_flow,
    "qwen_image": qwen_image,
}
CALLS: dict[str, dict[str, Any]] = {
    "sana": {"height": 32, "width": 32, "guidance_scale": 3.0, "use_resolution_binning": False},
    "lumina2": {"height": 32, "width": 32, "guidance_scale": 3.0, "max_sequence_length": 48},
    "wan": {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16},
    "aura_flow": {"height": 32, "width": 32, "guidance_scale": 3.0, "max_sequence_length": 16},
    "qwen_image": {"height": 32, "width": 32, "true_cfg_scale": 3.0, "negative_prompt": "a blue square on white"},
}
"""What each is called with, besides the prompt and the number of steps."""


def pipeline(name: str, seed: int = 0) -> Any:
    """One of `BUILDERS`, seeded, in eval mode, without a progress bar."""
    torch.manual_seed(seed)
    pipe = BUILDERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, name: str, prompt: str = PROMPT, steps: int = 4, seed: int = 7, **call: Any) -> torch.Tensor:
    """The final latents of one call of the pipeline."""
    given = {**CALLS[name], "num_inference_steps": steps, "output_type": "latent", **call}
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, return_dict=False, **given)[0]


def saved(name: str, folder: Path) -> Path:
    """The pipeline as a folder that `--model` accepts."""
    pipeline(name).save_pretrained(folder)
    return folder


def recipe(name: str, folder: Path, steps: tuple[int, ...] = (4,), **tables: Any) -> Recipe:
    """The recipe of the saved pipeline's denoiser, called as `CALLS` says. `tables` add to it or replace."""
    call = dict(CALLS[name])
    shapes = {key: call.pop(key) for key in Shapes.model_fields if key in call}
    sampler = {"steps": steps, "guidance_scale": call.pop("guidance_scale", None)}
    verify = {"picture_error": 0.1, "cached_psnr_db": 1.0, "seeds": 1, "prompts": (PROMPT,)}
    given = {
        "name": name,
        "description": f"the denoiser of {name} alone",
        "model": {"id": str(folder)},
        "fuse": {"qkv": False},
        "sampler": sampler,
        "shapes": shapes,
        "attach": {"arguments": call},
        "verify": verify,
    }
    return Recipe.model_validate({**given, **tables})


def uncompiled(recipe: Recipe, folder: Path) -> Artifact:
    """The recipe's artifact, its graphs run as they were captured. Plans lie in `folder`."""
    made = prepared(recipe)
    package.write_plans(folder, made.planned.plans)
    manifest = describe_artifact(
        folder, made, StoredWeights({name: {} for name in captured(made)}, ()), dict.fromkeys(captured(made), "")
    )
    graphs = {g.name: bound(g, captured(made)[g.name], manifest) for g in manifest.graphs}
    plans = read_plans(folder, manifest)
    tables = {n: tabulate_plan(p, CPU) for n, p in plans.items()}
    return Artifact(folder, manifest, CPU, {}, graphs, plans, tables)


MASK = {"method": "mask", "mask": "1(01)"}  # at 4 steps 1010
ROUNDING = 1e-5
"""Relative L2 of latents. Graphs are float32 and add in another order than eager: 6e-8 a sum, some 1e-7 after the loop.
A perturbed weight moves them by 1e-3 and more (`test_canary`)."""


def same(ours: Tensor, theirs: Tensor) -> bool:
    return relative_error(ours, theirs) <= ROUNDING


class Off:
    """A graph whose output is off by a thousandth."""

    def __init__(self, bound: Any) -> None:
        self.graph, self._bound = bound.graph, bound

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        return {n: t * 1.001 for n, t in self._bound(inputs).items()}


def direct(pipe: Any) -> None:
    pipe.transformer(torch.zeros(2, 4, 4, 4))
