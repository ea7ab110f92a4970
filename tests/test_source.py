"""Load: where a pipeline comes from, what is said of it, and every way in which there is none."""

from __future__ import annotations

import shutil

import pytest
import torch

from prebake.exporter import source
from prebake.runtime.errors import ExportError

FLOAT32 = {"default": torch.float32}


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_a_loaded_pipeline_is_frozen_named_and_brings_its_defaults(tiny_folder):
    loaded = source.load(str(tiny_folder), None, {**FLOAT32, "transformer": torch.bfloat16})
    assert loaded.source.model == tiny_folder.name
    assert loaded.source.pipeline == "FluxPipeline"
    assert loaded.defaults == {
        "height": 32,
        "width": 32,
        "max_sequence_length": 8,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
    }
    assert loaded.pipe.transformer.dtype == torch.bfloat16
    assert loaded.pipe.vae.dtype == torch.float32
    modules = [c for c in loaded.pipe.components.values() if isinstance(c, torch.nn.Module)]
    assert len(modules) == 4
    assert not any(m.training for m in modules)
    assert not any(p.requires_grad for m in modules for p in m.parameters())


def test_an_unknown_id_without_a_network_is_refused_with_what_there_is(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ExportError,
        match=r"model 'nobody/nothing': expected shapes, shapes-sd, a folder, or a hub id that can be downloaded; the hub says \w+: .+",
    ):
        source.load("nobody/nothing", None, FLOAT32)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(
        ExportError,
        match=r"expected a pipeline folder with model_index\.json, as save_pretrained writes it, found none",
    ):
        source.load(str(tmp_path), None, FLOAT32)


@pytest.mark.parametrize(
    "path", ["model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_corrupted_folder_is_refused_with_diffusers_words(copy, path):
    (copy / path).write_bytes(b"{ nonsense")
    with pytest.raises(ExportError, match=r"model '.+copy': diffusers could not read .+ \(\w+: .+\)$") as refused:
        source.load(str(copy), None, FLOAT32)
    assert refused.value.__cause__ is not None


def test_one_byte_of_any_part_changes_the_fingerprint(copy):
    before = source.fingerprint(copy)
    assert source.fingerprint(copy) == before
    for path in ("transformer/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "prebake.toml"):
        content = (copy / path).read_bytes()
        (copy / path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert source.fingerprint(copy) != before, path
        (copy / path).write_bytes(content)
    assert source.fingerprint(copy) == before


def test_the_fingerprint_depends_on_names_and_not_on_the_place(copy, tiny_folder):
    assert source.fingerprint(copy) == source.fingerprint(tiny_folder)
    (copy / "prebake.toml").rename(copy / "other.toml")
    assert source.fingerprint(copy) != source.fingerprint(tiny_folder)


def test_only_a_folders_last_part_is_its_name(copy, monkeypatch):
    assert source.name_of(str(copy)) == "copy"
    assert source.name_of(f"{copy}/") == "copy"
    monkeypatch.chdir(copy)
    assert source.name_of(".") == "copy"
    assert source.name_of("transformer/..") == "copy"
    assert source.name_of("shapes") == "shapes"
    assert source.name_of("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"


def test_a_folder_without_defaults_brings_none(copy):
    (copy / "prebake.toml").unlink()
    assert source.own_defaults(copy) == {}


@pytest.mark.parametrize(
    "text", ["[defaults]\nheight = ", "[defaults]\nheigth = 32", "defaults = 3", "[defaults]\nheight = 'tall'"]
)
def test_defaults_that_cannot_be_used_are_refused_with_the_file(copy, text):
    (copy / "prebake.toml").write_text(text)
    with pytest.raises(ExportError, match=r"prebake\.toml.*: .+"):
        source.own_defaults(copy)
