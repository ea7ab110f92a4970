"""Textual inversions: a prompt with their tokens draws what it draws in diffusers, and files that do not fit are refused."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prebake.exporter.load.source import load_model
from prebake.exporter.load.weight_files import hash_file
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.settle import load_pipeline
from prebake.exporter.tiny import TINY_MODELS
from prebake.runtime.errors import ExportError
from prebake.runtime.pipeline import Pipeline
from support.captured_pipeline import uncompiled
from support.family_parity import FAMILIES, PLAIN, TOLERANCE, relative_error, seeded

FLOAT32 = {"default": torch.float32}
PROMPTS = {
    "first": "<cat> on a table",
    "last, of several vectors": "a table and <dog>",
    "in the middle, twice": "red <dog> and <dog> and <cat>, blue",
    "inside a word": "the<cat>s",
    "in capitals": "a <CAT> and a <Dog>",
    "one vector of several": "a <dog>_1 alone",
    "alone": "<dog>",
    "cut off in the middle": "a big red circle " * 2 + "<dog> <dog> <dog> <cat>",
}


def width(pipe: Any, encoder: str) -> int:
    return getattr(pipe, encoder).get_input_embeddings().weight.shape[1]


def write_inversions(folder: Path, family: str) -> list[dict[str, str]]:
    """A token of one vector and one of three, in the layout that is usual for the family; the recipe's tables."""
    pipe, draw = load_model(f"tiny:{family}", None, FLOAT32).pipe, torch.Generator().manual_seed(3)
    given = []
    for token, count in (("<cat>", 1), ("<dog>", 3)):
        file = folder / f"{token.strip('<>')}.safetensors"

        def vectors(encoder: str, count: int = count) -> torch.Tensor:
            return torch.randn(count, width(pipe, encoder), generator=draw).squeeze(0)

        if family == "sd":
            save_file({token: vectors("text_encoder")}, file)
            given.append({"path": str(file)})
        else:
            second = "t5" if family == "flux" else "clip_g"
            save_file({"clip_l": vectors("text_encoder"), second: vectors("text_encoder_2")}, file)
            given.append({"path": str(file), "token": token})
    return given


def with_inversions(family: str, given: Any) -> Any:
    """The family's recipe, uncached in float32, with those in it."""
    pairs: dict[str, Any] = dict(o.split("=", 1) for o in PLAIN)
    return resolve(FAMILIES[family].recipe, {**pairs, "model.textual_inversion": given}, f"tiny:{family}")


@functools.cache
def both(family: str) -> tuple[Any, Pipeline]:
    """diffusers' pipeline and ours."""
    folder = Path(tempfile.mkdtemp(prefix="prebake-inversions-", dir=os.environ.get("PYTEST_TMP")))
    recipe = with_inversions(family, write_inversions(folder, family))
    return load_pipeline(recipe, FLOAT32).pipe, uncompiled(recipe, folder)


def draw(family: str, prompt: str, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' latents, and ours, after two steps."""
    theirs, ours = both(family)
    tiny = TINY_MODELS[family].defaults
    usual = {name: tiny[name] for name in ("height", "width", "num_inference_steps", "guidance_scale")}
    more = {"max_sequence_length": tiny["max_sequence_length"]} if family == "flux" else {}
    expected = theirs(prompt, **usual, **more, **call, generator=seeded(1), output_type="latent")[0]
    return expected, ours(prompt, seed=1, output_type="latent", **call)[0]


@pytest.mark.parametrize("where", PROMPTS)
def test_a_prompt_draws_what_diffusers_draws(where):
    expected, got = draw("sd", PROMPTS[where])
    assert relative_error(got, expected) < TOLERANCE
    if "cut" not in where and "capitals" not in where:
        other, _ = draw("sd", PROMPTS[where].replace("<cat>", "cat").replace("<dog>", "dog"))
        assert relative_error(other, expected) > 1e-4  # the canary: the tokens mean something


def test_a_negative_prompt_has_them_too():
    expected, got = draw("sd", "a <cat>", negative_prompt="blurry <dog>")
    assert relative_error(got, expected) < TOLERANCE
    other, _ = draw("sd", "a <cat>", negative_prompt="blurry dog")
    assert relative_error(other, expected) > 1e-4


@pytest.mark.parametrize("family", [pytest.param("sdxl", marks=pytest.mark.slow), "flux"])
def test_each_encoder_has_its_own(family):
    expected, got = draw(family, "red <dog> and <cat>")
    assert relative_error(got, expected) < TOLERANCE
    other, _ = draw(family, "red dog and cat")
    assert relative_error(other, expected) > 1e-5


def test_the_manifest_says_token_file_and_vectors(tmp_path):
    _, ours = both("sd")
    cat, dog = ours.artifact.manifest.source.inversions
    assert (cat.name, cat.token) == ("cat.safetensors", "<cat>")
    assert (dog.name, dog.token) == ("dog.safetensors", "<dog>")
    (prompt,) = ours.artifact.manifest.pipeline["text"]["prompts"]
    assert prompt["vectors"] == {"<dog>": 3}
    given = write_inversions(tmp_path, "sd")
    assert [cat.sha256, dog.sha256] == [hash_file(Path(one["path"])) for one in given]
    assert ours.artifact.manifest.source.title == "tiny:sd + <cat> + <dog>"


def test_a_pipeline_saved_with_them_needs_no_file(tmp_path):
    """The tokens lie in its tokenizer then, and the vectors in its encoder."""
    theirs, ours = both("sd")
    theirs.save_pretrained(tmp_path / "saved")
    pairs: dict[str, Any] = dict(o.split("=", 1) for o in PLAIN)
    saved = uncompiled(
        resolve("sd-fast", {**pairs, "shapes.height": 32, "shapes.width": 32}, str(tmp_path / "saved")), tmp_path
    )
    prompts = saved.artifact.manifest.pipeline["text"]["prompts"]
    assert prompts[0]["vectors"] == {"<dog>": 3}
    call = {"seed": 1, "output_type": "latent", "num_inference_steps": saved.steps[0]}
    del ours
    plan = saved("a <dog> and a <cat>", **call)[0]
    again = theirs(
        "a <dog> and a <cat>",
        height=32,
        width=32,
        num_inference_steps=saved.steps[0],
        guidance_scale=saved.artifact.manifest.defaults.guidance_scale,
        generator=seeded(1),
        output_type="latent",
    )[0]
    assert relative_error(plan, again) < TOLERANCE


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"<cat>": (7,)}, "cannot add it"),  # another width
        ({"clip_l": (32,), "clip_g": (32,)}, "no text_encoder_2"),
        ({"one": (32,), "two": (32,)}, "cannot add it"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, said, tmp_path):
    file = tmp_path / "cat.safetensors"
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, file)
    with pytest.raises(ExportError, match=r"model\.textual_inversion") as refused:
        load_pipeline(with_inversions("sd", [str(file)]), FLOAT32)
    assert said in str(refused.value)


def test_a_token_that_is_there_is_refused(tmp_path):
    (cat, _) = write_inversions(tmp_path, "sd")
    with pytest.raises(ExportError, match="cannot add it"):
        load_pipeline(with_inversions("sd", [cat, cat]), FLOAT32)


def test_a_pipeline_that_takes_none_says_so(tmp_path):
    recipe = resolve("sd3-fast", {"model.textual_inversion": ["cat.safetensors"]}, "tiny:sd3")
    with pytest.raises(ExportError, match="leave the key out"):
        load_pipeline(recipe, FLOAT32)
