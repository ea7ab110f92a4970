"""The tiny pipelines: reproducible, calm in bfloat16, and moved by prompt, seed, negative prompt and guidance."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prebake.exporter import tiny
from prebake.exporter.tiny import parts

# `flux-schnell` has no guidance, and the FLUX family none that takes a negative prompt at its defaults
NEGATIVE = ("sd", "sd2", "sdxl", "sdxl-refiner", "sd3", "pixart", "cogvideox")
GUIDED = tuple(name for name in tiny.TINY_MODELS if name != "flux-schnell")


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """Each of them, once."""
    made = {name: tiny.build_tiny_pipeline(name) for name in tiny.TINY_MODELS}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def draw(
    pipe: Any, name: str, prompt: str = "a red circle", seed: int = 0, output: str = "latent", **more: Any
) -> Tensor:
    """What the pipeline makes with its own defaults: latents, or pictures in 0..1 for `output="pt"`."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    chosen = {
        "use_resolution_binning": False,
        "clean_caption": False,
        "_auto_resize": False,
        **tiny.TINY_MODELS[name].defaults,
    }
    chosen["max_area"] = chosen["height"] * chosen["width"]
    if name in ("flux-kontext", "sdxl-refiner"):
        chosen["image"] = ramp(chosen["height"], chosen["width"])
    call = {key: value for key, value in chosen.items() if key in accepted} | more
    # a scheduler keeps what it did last
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type=output, **call)[0].float()


def ramp(height: int, width: int) -> Tensor:
    """A picture [1, 3, H, W] in 0..1, darker to the right and from channel to channel."""
    across = torch.linspace(0.9, 0.1, width).expand(1, 1, height, width)
    return torch.cat([across, 0.8 * across, 0.6 * across], 1)


def psnr(ours: Tensor, theirs: Tensor) -> float:
    """dB, of values in 0..1."""
    return -10 * float(torch.log10((ours - theirs).square().mean()))


def apart(one: Tensor, other: Tensor) -> float:
    """The relative difference of two tensors, in the L2 norm."""
    return float((one - other).norm() / one.norm())


def rounded(pipe: Any) -> Any:
    """A copy in bfloat16."""
    half = copy.deepcopy(pipe)
    for part in half.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.bfloat16)
    return half


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_bfloat16_draws_the_same_picture(pipes, name):
    exact, half = draw(pipes[name], name, output="pt"), draw(rounded(pipes[name]), name, output="pt")
    # recipes ask 45 dB of a bfloat16 artifact against float32; the arithmetic alone must leave room for that
    assert psnr(half, exact) >= 48
    assert 0.03 < exact.std() < 0.3  # neither grey, which any arithmetic gets right, nor black and white


def test_fast_sinusoids_are_what_would_not_survive_bfloat16(monkeypatch):
    monkeypatch.setattr(parts, "slow_factors", torch.ones)
    wild = tiny.build_tiny_pipeline("flux")
    wild.set_progress_bar_config(disable=True)
    assert psnr(draw(rounded(wild), "flux", output="pt"), draw(wild, "flux", output="pt")) < 45


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_prompt_and_seed_move_the_latents(pipes, name):
    first = draw(pipes[name], name)
    assert torch.equal(first, draw(pipes[name], name))
    # a thousand times what float32 rounding does to them
    assert apart(first, draw(pipes[name], name, "a blue cat on the moon")) > 1e-2
    assert apart(first, draw(pipes[name], name, seed=1)) > 1e-1


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_negative_prompt_moves_the_latents(pipes, name):
    assert apart(draw(pipes[name], name), draw(pipes[name], name, negative_prompt="blurry, ugly")) > 1e-2


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_moves_the_latents(pipes, name):
    more = tiny.TINY_MODELS[name].defaults["guidance_scale"] + 1
    assert apart(draw(pipes[name], name), draw(pipes[name], name, guidance_scale=more)) > 1e-2


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_seeds_give_weights_and_leave_torchs_own_generator(name):
    torch.manual_seed(5)
    first = weights(tiny.build_tiny_pipeline(name))
    torch.manual_seed(6)
    again, other = weights(tiny.build_tiny_pipeline(name)), weights(tiny.build_tiny_pipeline(name, seed=1))
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert sum(value.numel() for value in first.values()) < 1_000_000


def weights(pipe: Any) -> dict[str, Tensor]:
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl", "sdxl-refiner", "sd3", "pixart", "flux", "flux-kontext"])
def test_a_picture_is_encoded_to_latents_of_the_size_of_noise(pipes, name):
    vae = pipes[name].vae
    with torch.no_grad():
        posterior = vae.encode(2 * ramp(32, 32) - 1).latent_dist
    shift = vae.config.shift_factor or 0.0
    assert 0.2 < ((posterior.mean - shift) * vae.config.scaling_factor).std() < 5
    assert 0.005 < (posterior.std * vae.config.scaling_factor).mean() < 0.5


@pytest.mark.parametrize("name", tiny.TINY_MODELS)
def test_a_saved_pipeline_is_the_same_when_it_is_read(pipes, name, tmp_path):
    folder = tiny.save_tiny_pipeline(name, tmp_path / "saved")
    read = type(pipes[name]).from_pretrained(folder)
    read.set_progress_bar_config(disable=True)
    assert {k: type(v) for k, v in read.components.items()} == {k: type(v) for k, v in pipes[name].components.items()}
    ours, theirs = weights(pipes[name]), weights(read)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # the weights lie elsewhere in memory, so sums may be taken in another order; a configuration that is lost does more
    assert apart(draw(pipes[name], name), draw(read, name)) < 1e-5


# --- tokenizers -----------------------------------------------------------------------------------------------------

TOKENIZERS = {"clip": parts.clip_tokenizer(), "t5": parts.t5_tokenizer(max_length=64)}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_word_is_one_token(tokenizer):
    assert len(set(parts.TOKEN_WORDS)) == len(parts.TOKEN_WORDS)
    ids = tokenizer(list(parts.TOKEN_WORDS), add_special_tokens=False)["input_ids"]
    assert all(len(each) == 1 for each in ids)
    assert len({each[0] for each in ids}) == len(parts.TOKEN_WORDS)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_words_that_are_not_in_the_vocabulary_differ_all_the_same(tokenizer):
    one, other = tokenizer(["a quixotic zebra", "a quixotic zebu"])["input_ids"]
    assert one != other
    assert tokenizer.unk_token_id not in one[1:-1]


def test_the_ends_and_the_padding_are_those_of_the_real_tokenizers():
    kept = {"padding": "max_length", "max_length": 8}
    clip, second = parts.clip_tokenizer(), parts.clip_tokenizer(pad="!")
    start, end = clip.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    red = clip.convert_tokens_to_ids("red</w>")
    assert (start, end) == (len(clip) - 2, len(clip) - 1)
    assert clip("Red", **kept)["input_ids"] == [start, red] + [end] * 6
    assert second("red", **kept)["input_ids"] == [start, red, end] + [0] * 5
    t5 = parts.t5_tokenizer(max_length=8)
    assert t5("red", **kept)["input_ids"] == [t5.convert_tokens_to_ids("▁red"), 1] + [0] * 6
