"""Weights in shards: opened like one file, hashed side by side, and refused when one is missing, exchanged or a stranger's."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prebake.exporter.package import folder as package
from prebake.exporter.package.folder import save_shards, update_manifest
from prebake.runtime import ArtifactError, load
from prebake.runtime.artifact import open_artifact
from prebake.runtime.manifest import read_manifest
from prebake.runtime.storage import files
from prebake.runtime.storage.weight_files import component_name
from prebake.runtime.text import weights_bytes


@pytest.fixture
def sharded(artifact_copy, monkeypatch) -> Path:
    """The toy, its weights in as many shards as there are tensors."""
    monkeypatch.setattr(package, "MAX_SHARD_BYTES", 1)
    manifest = read_manifest(artifact_copy)
    for path in sorted((artifact_copy / "weights").iterdir()):
        tensors = load_file(path)
        path.unlink()
        save_shards(tensors, path.parent, path.stem)
    return keep_manifest(artifact_copy, manifest)


def keep_manifest(folder: Path, manifest) -> Path:
    """The artifact with a manifest of the files that are there."""
    update_manifest(folder, manifest, manifest.model_copy(update={"files": ()}))
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "weights").iterdir() if "-of-" in path.name)


def draw(folder: Path, cache_dir: Path, **options) -> torch.Tensor:
    return load(folder, cache_dir=cache_dir, **options)("red", seed=1, output_type="pt").images


def test_an_artifact_in_shards_draws_what_it_drew(sharded, toy_artifact, cache_dir):
    count = len(shards(sharded))
    assert count > 2
    assert {component_name(e.path) for e in read_manifest(sharded).files if e.path.startswith("weights/")} == set(
        weights_bytes(read_manifest(toy_artifact))
    )
    expected = draw(toy_artifact, cache_dir)  # of single files, which go on loading
    drawn = draw(sharded, cache_dir)
    # a weight at another offset of its page may be summed in another order: float32 rounding
    assert torch.allclose(drawn, expected, atol=1e-5)
    assert torch.equal(draw(sharded, cache_dir, copy=True), drawn)
    assert torch.equal(draw(sharded, cache_dir, warm=True), drawn)


def test_shards_are_named_as_others_name_theirs_and_none_is_larger(tmp_path, monkeypatch):
    tensors = {f"d.{i}": torch.full((100,), float(i)) for i in range(5)} | {"d.large": torch.zeros(300)}
    save_shards(tensors, tmp_path, "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.safetensors"]
    monkeypatch.setattr(package, "MAX_SHARD_BYTES", 800)
    (tmp_path / "parts").mkdir()
    save_shards(tensors, tmp_path / "parts", "denoiser")
    parts = sorted((tmp_path / "parts").iterdir())
    assert [path.name for path in parts] == [f"denoiser-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    held = [load_file(path) for path in parts]
    assert sorted(key for part in held for key in part) == sorted(tensors)  # each once
    sizes = {max(part, key=len): sum(t.nbytes for t in part.values()) for part in held}
    assert sizes.pop("d.large") == 1200  # one that has more than a shard is alone
    assert max(sizes.values()) <= 800
    again = tmp_path / "again"
    again.mkdir()
    save_shards(tensors, again, "denoiser")
    assert [p.read_bytes() for p in parts] == [p.read_bytes() for p in sorted(again.iterdir())]
    assert {component_name(f"weights/{path.name}") for path in parts} == {"denoiser"}
    assert component_name("weights/vae_decoder.safetensors") == "vae_decoder"
    assert package.save_shards({}, again, "nothing") is None
    assert load_file(again / "nothing.safetensors") == {}


def remove(folder: Path, tmp: Path) -> None:
    shards(folder)[0].unlink()


def exchange(folder: Path, tmp: Path) -> None:
    """Two shards of one size, each under the other's name."""
    sizes: dict[int, list[Path]] = {}
    for path in shards(folder):
        sizes.setdefault(path.stat().st_size, []).append(path)
    one, other = next(paths for paths in sizes.values() if len(paths) > 1)[:2]
    one.rename(tmp / "one")
    other.rename(one)
    (tmp / "one").rename(other)


def add_stranger(folder: Path, tmp: Path) -> None:
    shutil.copy(shards(folder)[0], folder / "weights" / "denoiser-00001-of-99999.safetensors")


def replace_by_stranger(folder: Path, tmp: Path) -> None:
    """Another artifact's shard: the same header and size, other numbers."""
    path = shards(folder)[0]
    data = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    data[8 + header :] = bytes(len(data) - 8 - header - 1) + b"\x01"
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove, r"-00001-of-\d{5}\.safetensors is missing, the manifest lists it"),
        (exchange, r"-of-\d{5}\.safetensors: sha256 is .* the manifest says"),
        (add_stranger, r"denoiser-00001-of-99999\.safetensors is not in the manifest; remove it"),
        (replace_by_stranger, r"-00001-of-\d{5}\.safetensors: sha256 is .* the manifest says"),
    ],
    ids=["remove", "exchange", "add_stranger", "replace_by_stranger"],
)
def test_a_shard_that_is_not_its_own_is_refused(sharded, cache_dir, tmp_path, damage, said):
    damage(sharded, tmp_path)
    with pytest.raises(ArtifactError, match=said):
        load(sharded, cache_dir=cache_dir)


def test_a_set_of_shards_that_lacks_one_is_refused_whatever_its_manifest_says(sharded, cache_dir):
    manifest = read_manifest(sharded)
    shards(sharded)[0].unlink()
    with pytest.raises(ArtifactError, match=r"is in no weight file .*export again"):
        load(keep_manifest(sharded, manifest), cache_dir=cache_dir, trust="size")


def test_a_key_in_two_shards_is_refused(sharded, cache_dir):
    manifest = read_manifest(sharded)
    first, second = shards(sharded)[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(ArtifactError, match="is in another weight file too"):
        load(keep_manifest(sharded, manifest), cache_dir=cache_dir)


# --- warming --------------------------------------------------------------------------------------------------------


def test_warm_reads_every_byte_of_the_weights_and_of_nothing_else(sharded, cache_dir, monkeypatch):
    read: dict[str, int] = {}
    monkeypatch.setattr(files, "work_on_files", lambda opened, work: {path: work(path) for path in opened})
    real = os.preadv
    opened: dict[int, str] = {}

    def counted(descriptor, buffers, at):
        count = real(descriptor, buffers, at)
        name = opened.setdefault(descriptor, Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        read[name] = read.get(name, 0) + count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "preadv", counted)
        open_artifact(sharded, cache_dir=cache_dir, trust="size", warm=True).close()
    weights = {path.name: path.stat().st_size for path in (sharded / "weights").iterdir()}
    assert {name: count for name, count in read.items() if name in weights} == weights
    read.clear()
    with monkeypatch.context() as patch:  # the canary: without it they are mapped only
        patch.setattr(files.os, "preadv", counted)
        open_artifact(sharded, cache_dir=cache_dir, trust="size").close()
    assert not set(read) & set(weights)


def test_a_weight_file_that_cannot_be_read_ahead_is_named(sharded, cache_dir, monkeypatch):
    def fail(opened) -> None:
        raise OSError(5, "Input/output error", next(iter(opened)))

    monkeypatch.setattr("prebake.runtime.artifact.read_into_page_cache", fail)
    with pytest.raises(ArtifactError, match=r"weights/\S+: cannot be read .*disk"):
        load(sharded, cache_dir=cache_dir, warm=True)


def test_a_manifest_of_shards_is_plain_json(sharded):
    listed = [entry["path"] for entry in json.loads((sharded / "manifest.json").read_text())["files"]]
    assert [f"weights/{path.name}" for path in shards(sharded)] == [path for path in listed if "-of-" in path]
