"""The second committed model: its size, its loading by plain diffusers, its structure, and that its parts fit together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from prebake.exporter.load import source
from prebake.exporter.shapes import MODEL_FOLDER, SD_MODEL_FOLDER, read_prompt_set
from prebake.exporter.shapes.checker import accuracy
from prebake.exporter.shapes.evaluate import draw_prompts, read_call_defaults

CALL = {"height": 64, "width": 64, "num_inference_steps": 28, "guidance_scale": 3.0}
SHORT = CALL | {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(SD_MODEL_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_folder_is_safetensors_of_at_most_10_mb():
    files = [path for path in Path(SD_MODEL_FOLDER).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".toml"}
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_it_is_loaded_by_its_name_with_its_defaults():
    loaded = source.load_model("shapes-sd", None, {"default": torch.float32, "unet": torch.bfloat16})
    assert loaded.source.model == "shapes-sd"
    assert loaded.source.pipeline == "StableDiffusionPipeline"
    assert loaded.defaults == read_call_defaults(SD_MODEL_FOLDER) == CALL
    assert loaded.pipe.unet.dtype == torch.bfloat16
    assert loaded.pipe.vae.dtype == loaded.pipe.text_encoder.dtype == torch.float32


def test_parts_are_those_of_stable_diffusion(pipeline):
    unet = pipeline.unet
    assert pipeline.safety_checker is pipeline.feature_extractor is None
    assert not pipeline.config.requires_safety_checker
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert [len(block.resnets) for block in unet.down_blocks] == [2, 2, 2]
    assert [len(block.resnets) for block in unet.up_blocks] == [3, 3, 3]
    assert [getattr(block, "has_cross_attention", False) for block in unet.down_blocks] == [True, True, False]
    assert [getattr(block, "has_cross_attention", False) for block in unet.up_blocks] == [False, True, True]
    assert unet.mid_block.has_cross_attention
    assert unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size


def test_text_encoder_and_tokenizer_are_those_of_the_first_model():
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (SD_MODEL_FOLDER / name).read_bytes() == (MODEL_FOLDER / name).read_bytes()


def test_vae_is_that_of_the_first_model_with_its_shift_in_it(pipeline):
    """The same pictures from latents of mean 0, and the same latents from pictures, bit for bit but for the shift's."""
    first = AutoencoderKL.from_pretrained(MODEL_FOLDER / "vae")
    scale, shift = first.config.scaling_factor, torch.tensor(first.config.shift_factor).bfloat16().item()
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert pipeline.vae.config.scaling_factor == scale
    assert pipeline.vae.config.shift_factor is None
    with torch.inference_mode():
        pictures = first.decode(latents / scale + shift).sample
        assert torch.equal(pipeline.vae.decode(latents / scale).sample, pictures)
        assert torch.equal(
            pipeline.vae.encode(pictures).latent_dist.mean, first.encode(pictures).latent_dist.mean - shift
        )


@pytest.mark.parametrize("steps", [28, 21, 20, 14, 10, 8, 7, 4, 1])
def test_a_step_ends_at_the_noise_level_where_the_next_begins(pipeline, steps):
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    reached = scheduler.timesteps - scheduler.config.num_train_timesteps // steps
    assert scheduler.timesteps[0] == scheduler.config.num_train_timesteps - 1
    assert torch.equal(reached[:-1], scheduler.timesteps[1:])
    assert reached[-1] == -1  # no noise: set_alpha_to_one
    assert scheduler.final_alpha_cumprod == 1


def test_a_picture_is_finite_and_drawn_again_from_its_seed(pipeline):
    pictures = [draw_prompts(pipeline, read_prompt_set("full")[:1], SHORT) for _ in range(2)]
    assert np.isfinite(pictures[0]).all()
    assert pictures[0].std() > 0.02
    assert np.array_equal(*pictures)


def test_guidance_and_prompt_change_the_picture(pipeline):
    """Canary: the second evaluation counts, and so does the text."""
    text = read_prompt_set("full")[:1]
    guided = draw_prompts(pipeline, text, SHORT)
    assert np.abs(draw_prompts(pipeline, text, SHORT | {"guidance_scale": 1.0}) - guided).mean() > 1e-3
    assert np.abs(draw_prompts(pipeline, [""], SHORT) - guided).mean() > 1e-2


def test_first_full_prompts_are_mostly_exact(pipeline):
    texts = read_prompt_set("full")[:16]
    assert accuracy(draw_prompts(pipeline, texts, CALL | {"num_inference_steps": 14}, batch=16), texts)["exact"] >= 0.7
