"""Load: where a pipeline comes from, what is said of it, and every way in which there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from prebake.exporter import tiny
from prebake.exporter.load import source
from prebake.runtime.errors import ExportError
from support.single_file_pipeline import original

FLOAT32 = {"default": torch.float32}


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_a_loaded_pipeline_is_frozen_named_and_brings_its_defaults(tiny_folder):
    loaded = source.load_model(str(tiny_folder), None, {**FLOAT32, "transformer": torch.bfloat16})
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


def test_an_unknown_id_without_a_network_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError) as refused:
        source.load_model("nobody/nothing", None, FLOAT32)
    assert str(refused.value).startswith(
        "model 'nobody/nothing': it is not in the hub's cache and the hub cannot be reached; export once with a network"
    )


@pytest.mark.parametrize("model", ["./no/such/folder", "model.safetensors", "/nowhere", "a/b/c", "two words"])
def test_a_path_that_is_not_there_never_reaches_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ExportError, match=r"no such file or folder; expected shapes, .+, or a hub id"):
        source.load_model(model, None, FLOAT32)


def test_a_hub_id_goes_through_diffusers_with_its_revision(tiny_folder, monkeypatch):
    asked = []

    def download(name, revision):
        asked.append((name, revision))
        return str(tiny_folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    loaded = source.load_model("someone/flux", "v2", FLOAT32)
    assert asked == [("someone/flux", "v2")]
    assert loaded.source.model == "someone/flux"
    assert loaded.source.sha256 == source.model_fingerprint(tiny_folder)


def hub_error(kind: type[errors.HfHubHTTPError]) -> Exception:
    """The error as huggingface_hub raises it for an answer of the server; of the response, it keeps the headers."""
    return kind("refused", response=SimpleNamespace(headers={}, request=None, status_code=403))


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (
            hub_error(errors.GatedRepoError),
            "its owner asks for a licence to be accepted; do so on the model's page, https://huggingface.co/some/model, "
            "and log in with `hf auth login`",
        ),
        (
            hub_error(errors.RepositoryNotFoundError),
            "the hub has no such model, or it is private; check the name, or log in with `hf auth login`",
        ),
        (
            hub_error(errors.RevisionNotFoundError),
            "the hub has no revision 'v9' of it; give a branch, tag or commit that its page lists, or none",
        ),
        (
            errors.LocalEntryNotFoundError("nothing here"),
            "it is not in the hub's cache and the hub cannot be reached; export once with a network (and without "
            "HF_HUB_OFFLINE), or give the folder of a pipeline; the cause: ",
        ),
        (hub_error(errors.HfHubHTTPError), "the hub says "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_what_the_hub_refuses_comes_with_the_way_out(error, way_out, wrapped, monkeypatch):
    def download(name, revision):
        if wrapped:  # as diffusers does when it has looked into the cache in vain
            raise OSError(f"Cannot load model {name}") from error
        raise error

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(ExportError) as refused:
        source.load_model("some/model", "v9", FLOAT32)
    assert str(refused.value).startswith(f"model 'some/model': {way_out}")
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(
        ExportError,
        match=r"pipeline folder with model_index\.json, .*found none",
    ):
        source.load_model(str(tmp_path), None, FLOAT32)


@pytest.mark.parametrize(
    "path", ["model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_corrupted_folder_is_refused_with_diffusers_words(copy, path):
    (copy / path).write_bytes(b"{ nonsense")
    with pytest.raises(ExportError, match=r"model '.+copy': diffusers could not read .+ \(\w+: .+\)$") as refused:
        source.load_model(str(copy), None, FLOAT32)
    assert refused.value.__cause__ is not None


def test_one_byte_of_any_part_changes_the_fingerprint(copy):
    before = source.model_fingerprint(copy)
    assert source.model_fingerprint(copy) == before
    for path in ("transformer/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "prebake.toml"):
        content = (copy / path).read_bytes()
        (copy / path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert source.model_fingerprint(copy) != before, path
        (copy / path).write_bytes(content)
    assert source.model_fingerprint(copy) == before


def test_the_fingerprint_depends_on_names_and_not_on_the_place(copy, tiny_folder):
    assert source.model_fingerprint(copy) == source.model_fingerprint(tiny_folder)
    (copy / "prebake.toml").rename(copy / "other.toml")
    assert source.model_fingerprint(copy) != source.model_fingerprint(tiny_folder)


def test_only_a_folders_last_part_is_its_name(copy, monkeypatch):
    assert source.model_name(str(copy)) == "copy"
    assert source.model_name(f"{copy}/") == "copy"
    monkeypatch.chdir(copy)
    assert source.model_name(".") == "copy"
    assert source.model_name("transformer/..") == "copy"
    assert source.model_name("shapes") == "shapes"
    assert source.model_name("tiny:flux") == "tiny:flux"
    assert (
        source.model_name(str(copy / "vae" / "diffusion_pytorch_model.safetensors"))
        == "diffusion_pytorch_model.safetensors"
    )
    assert source.model_name("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"


def test_a_folder_without_defaults_brings_none(copy):
    (copy / "prebake.toml").unlink()
    assert source.read_model_defaults(copy) == {}


@pytest.mark.parametrize(
    "text", ["[defaults]\nheight = ", "[defaults]\nheigth = 32", "defaults = 3", "[defaults]\nheight = 'tall'"]
)
def test_defaults_that_cannot_be_used_are_refused_with_the_file(copy, text):
    (copy / "prebake.toml").write_text(text)
    with pytest.raises(ExportError, match=r"prebake\.toml.*: .+"):
        source.read_model_defaults(copy)


# --- tiny models ----------------------------------------------------------------------------------------------------


def test_a_tiny_model_is_the_same_bytes_in_every_process_and_leaves_nothing():
    script = (
        "import torch; from prebake.exporter.load import source;"
        "loaded = source.load_model('tiny:sd', None, {'default': torch.float32});"
        "print(loaded.source.model, loaded.source.sha256, source.find_model('tiny:sd'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    name, digest, folder = done.stdout.split()
    assert name == "tiny:sd"
    assert digest == source.load_model("tiny:sd", None, FLOAT32).source.sha256
    assert folder != str(source.find_model("tiny:sd"))
    assert not Path(folder).exists()


def test_a_tiny_model_is_built_once_and_brings_its_defaults():
    assert source.find_model("tiny:cogvideox") == source.find_model("tiny:cogvideox")
    loaded = source.load_model("tiny:cogvideox", None, FLOAT32)
    assert loaded.defaults == tiny.TINY_MODELS["cogvideox"].defaults
    assert "num_frames" in loaded.defaults


def test_an_unknown_tiny_model_is_refused_with_those_that_exist():
    with pytest.raises(ExportError, match=r"model 'tiny:fluks': expected one of .*tiny:sd"):
        source.load_model("tiny:fluks", None, FLOAT32)


@pytest.mark.parametrize(
    ("name", "known"),
    [("shapes", True), ("tiny:sd", True), ("a/b", True), ("folder", False), ("model.safetensors", False)],
)
def test_a_manifests_name_says_where_the_model_is_or_not(name, known):
    assert source.is_known_model(name) is known


# --- variants -------------------------------------------------------------------------------------------------------


def as_variant(folder: Path, *components: str) -> None:
    for component in components:
        for path in (folder / component).glob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))


def test_a_folder_of_nothing_but_a_variant_is_read_and_said(copy, tiny_folder):
    as_variant(copy, "transformer", "vae", "text_encoder", "text_encoder_2")
    with pytest.warns(UserWarning, match=r"it has no weights but the variant 'fp16', so these are read"):
        loaded = source.load_model(str(copy), None, FLOAT32)
    expected = source.load_model(str(tiny_folder), None, FLOAT32).pipe.transformer.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.pipe.transformer.state_dict().items())


def test_plain_weights_go_before_a_variant(copy):
    path = next((copy / "transformer").glob("*.safetensors"))
    shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    assert source.weights_variant(copy) is None
    as_variant(copy, "vae")
    assert source.weights_variant(copy) == "fp16"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00003.safetensors", None),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
    ],
)
def test_weight_files_are_known_by_diffusers_names(name, variant):
    assert source.WEIGHTS_PATTERN.fullmatch(name)["variant"] == variant


# --- single files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """A file in the original layout, and beside it the folder `config`, without weights."""
    folder = tmp_path_factory.mktemp("single")
    save_file(original(tiny.build_tiny_pipeline("sd")), folder / "model.safetensors")
    tiny.save_tiny_pipeline("sd", folder / "config")
    for weights in folder.glob("config/*/*.safetensors"):
        weights.unlink()
    return folder / "model.safetensors"


def test_a_single_file_is_the_same_pipeline(single):
    loaded = source.load_model(str(single), None, FLOAT32, "config")
    assert loaded.source.pipeline == "StableDiffusionPipeline"
    assert loaded.source.model == "model.safetensors"
    assert loaded.defaults == tiny.TINY_MODELS["sd"].defaults
    made = tiny.build_tiny_pipeline("sd")
    latents = []
    for pipe in (loaded.pipe, made):
        pipe.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(0)
        latents.append(pipe("a red circle", num_inference_steps=2, output_type="latent", generator=seeded).images)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded.pipe, part).state_dict(), getattr(made, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # the weights lie elsewhere in memory, so sums may be taken in another order; another tokenizer or scheduler does more
    assert (latents[0] - latents[1]).norm() < 1e-5 * latents[1].norm()


def test_a_single_file_is_cast_as_asked(single):
    pipe = source.load_model(
        str(single), None, {**FLOAT32, "unet": torch.bfloat16, "vae": torch.float32}, "config"
    ).pipe
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_the_fingerprint_of_a_single_file_is_of_bytes_and_configuration(single, tmp_path):
    before = source.model_fingerprint(single.parent / "config", single)
    moved = shutil.copytree(single.parent, tmp_path / "moved")
    (moved / "model.safetensors").rename(moved / "other.safetensors")
    assert source.model_fingerprint(moved / "config", moved / "other.safetensors") == before
    scheduler = moved / "config" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + " ")
    assert source.model_fingerprint(moved / "config", moved / "other.safetensors") != before


def test_a_single_file_without_its_configuration_says_which_and_the_way_out(single, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError) as refused:
        source.load_model(str(single), None, FLOAT32)
    assert str(refused.value).startswith(
        "model 'model.safetensors': its configuration is that of stable-diffusion-v1-5/stable-diffusion-v1-5, and it is "
        "not in the hub's cache and the hub cannot be reached; "
    )
    assert str(refused.value).endswith(
        "; or set model.config to the folder of such a pipeline, of which only what the file lacks is read"
    )


def test_a_single_file_of_another_kind_is_refused_by_its_name(tmp_path):
    save_file({"clip_txt_mapper.weight": torch.zeros(1536, 1)}, tmp_path / "cascade.safetensors")
    with pytest.raises(ExportError, match=r"'cascade.safetensors': .*'stable_cascade_stage_c_lite'"):
        source.load_model(str(tmp_path / "cascade.safetensors"), None, FLOAT32)


def test_a_damaged_single_file_is_refused(single, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"nonsense")
    for config in (None, str(single.parent / "config")):
        with pytest.raises(ExportError, match=r"'damaged.safetensors': .+ not read .+damaged.safetensors"):
            source.load_model(str(tmp_path / "damaged.safetensors"), None, FLOAT32, config)


def test_a_configuration_that_is_not_there_or_not_needed_is_refused(single, tiny_folder, tmp_path):
    with pytest.raises(ExportError, match=r"model.config 'nowhere': expected a folder.*, found none"):
        source.load_model(str(single), None, FLOAT32, "nowhere")
    with pytest.raises(ExportError, match=r"model.config .+: expected .* model_index.json"):
        source.load_model(str(single), None, FLOAT32, str(tmp_path))
    with pytest.raises(ExportError, match=r"model.config goes with one safetensors file"):
        source.load_model(str(tiny_folder), None, FLOAT32, "config")


@pytest.mark.parametrize(("name", "nearest"), [("shape", "'shapes'"), ("shapes-ds", "'shapes-sd'"), ("tiny:fluxx", "'tiny:flux'")])  # fmt: skip
def test_a_misspelt_model_has_a_nearest(name, nearest):
    with pytest.raises(ExportError, match=f"did you mean {nearest}"):
        source.find_model(name)


# --- files that lack weights ----------------------------------------------------------------------------------------


def drop_weights(folder: Path, count: int = 2) -> list[str]:
    """Leaves the first weights out of a component's file; their names."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    gone = sorted(weights)[:count]
    save_file({k: v for k, v in weights.items() if k not in gone}, file, metadata={"format": "pt"})
    return gone


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_component_that_lacks_weights_is_named_with_them(copy, component):
    gone = drop_weights(copy / component)
    with pytest.raises(ExportError, match=r"download or save the whole model again$") as refused:
        source.load_model(str(copy), None, {**FLOAT32, "transformer": torch.bfloat16})
    assert f"model 'copy': {component} lacks {gone[0]}, {gone[1]}; " in str(refused.value)


def test_of_a_variant_and_of_torch_files_weights_are_missed_too(copy):
    as_variant(copy, "transformer", "vae", "text_encoder", "text_encoder_2")
    gone = drop_weights(copy / "text_encoder", 6)
    file = copy / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    weights = load_file(file)
    weights.pop("decoder.conv_out.bias")
    torch.save(weights, file.with_suffix(".bin"))
    file.unlink()
    with pytest.warns(UserWarning, match="the variant 'fp16'"), pytest.raises(ExportError) as refused:
        source.load_model(str(copy), None, FLOAT32)
    assert f"text_encoder lacks {', '.join(gone[:4])} and 2 more" in str(refused.value)
    assert "vae lacks decoder.conv_out.bias" in str(refused.value)


def test_a_whole_model_lacks_nothing_and_the_libraries_are_as_they_were(copy):
    before = [vars(kind)["from_pretrained"] for kind in (ModelMixin, PreTrainedModel)]
    source.load_model(str(copy), None, FLOAT32)
    drop_weights(copy / "vae")
    with pytest.raises(ExportError):
        source.load_model(str(copy), None, FLOAT32)
    assert [vars(kind)["from_pretrained"] for kind in (ModelMixin, PreTrainedModel)] == before


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("model.diffusion_model.out.2.bias", "unet lacks conv_out.bias; "),
        ("first_stage_model.decoder.norm_out.bias", "vae lacks decoder.conv_norm_out.bias; "),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.v_proj.bias",
            "text_encoder lacks encoder.layers.0.self_attn.v_proj.bias; ",
        ),
    ],
)
def test_a_single_file_that_lacks_weights_names_the_component_and_them(single, tmp_path, gone, told):
    weights = load_file(single)
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ExportError) as refused:
        source.load_model(str(tmp_path / "model.safetensors"), None, FLOAT32, str(single.parent / "config"))
    assert str(refused.value).startswith(f"model 'model.safetensors': {told}")
