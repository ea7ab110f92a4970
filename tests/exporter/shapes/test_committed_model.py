"""The committed model: its size, its loading by plain diffusers, and what it draws."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from tokenizers import Tokenizer

from prebake.exporter.shapes import MODEL_FOLDER, read_prompt_set
from prebake.exporter.shapes.checker import accuracy, check_picture
from prebake.exporter.shapes.evaluate import draw_prompts, read_call_defaults

CALL = {"height": 64, "width": 64, "max_sequence_length": 16, "num_inference_steps": 28, "guidance_scale": 3.5}


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(MODEL_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_folder_is_safetensors_of_at_most_12_mb():
    files = [path for path in Path(MODEL_FOLDER).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".toml"}


def test_defaults_are_those_that_the_figures_were_measured_with():
    assert read_call_defaults(MODEL_FOLDER) == CALL


def test_parts_are_those_of_flux_dev(pipeline):
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.scheduler.config.use_dynamic_shifting
    assert pipeline.vae.config.mid_block_add_attention
    dtypes = {part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(("folder", "length"), [("tokenizer", 32), ("tokenizer_2", 16)])
def test_tokenizer_json_alone_gives_the_ids_of_the_pipeline(pipeline, folder, length):
    theirs = getattr(pipeline, folder)
    alone = Tokenizer.from_file(str(Path(MODEL_FOLDER) / folder / "tokenizer.json"))
    assert theirs.model_max_length == length
    for prompt in (*read_prompt_set("full")[:32], *read_prompt_set("underspecified"), "", "A zebra, 3 of them!"):
        assert alone.encode(prompt).ids == theirs(prompt)["input_ids"]
        assert len(alone.encode(prompt).ids) <= 16


def test_clip_pools_at_its_own_end_token(pipeline):
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id != 2


@pytest.mark.parametrize("ground", ["", " on a white background"])
def test_showcase_prompt_is_drawn_exactly(pipeline, ground):
    prompt = "a large red circle left of a small blue square" + ground
    picture = pipeline(prompt, generator=torch.Generator().manual_seed(7), **CALL).images[0]
    verdict = check_picture(picture, prompt)
    assert verdict.exact, verdict


def test_first_full_prompts_are_mostly_exact(pipeline):
    texts = read_prompt_set("full")[:24]
    assert accuracy(draw_prompts(pipeline, texts, CALL, batch=24), texts)["exact"] >= 0.8


def test_another_prompt_is_not_exact(pipeline):
    """Canary: pictures judged by their neighbours' prompts fail, so the accuracy above is the prompts' doing."""
    texts = read_prompt_set("full")[:8]
    pictures = draw_prompts(pipeline, texts, CALL, batch=8)
    assert accuracy(pictures, texts[1:] + texts[:1])["exact"] == 0.0
