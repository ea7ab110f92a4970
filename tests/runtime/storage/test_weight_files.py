"""Weight files that are written to while an artifact has them mapped: said, and of no matter to a copy."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from prebake.runtime import ArtifactError, artifact, load

WRITTEN = r"\.safetensors was written to"


def weight_file(folder) -> Path:
    return max((folder / "weights").iterdir(), key=lambda path: path.stat().st_size)


def write_into(path, change=lambda data: bytes(b ^ 1 for b in data)):
    """Writes the last bytes of the file in place, as `cp` writes into the file that it finds."""
    os.utime(path, ns=(1, 1))  # so that a coarse clock shows the next write
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        last = file.read()
        file.seek(-64, os.SEEK_END)
        file.write(change(last))


def draw(pipe):
    return pipe("red", seed=1, output_type="pt").images


@pytest.fixture
def opened(artifact_copy, cache_dir):
    return load(artifact_copy, cache_dir=cache_dir)


def test_a_file_that_is_written_to_after_load_is_named(opened, artifact_copy):
    draw(opened)
    write_into(weight_file(artifact_copy))
    for _ in range(2):
        with pytest.raises(ArtifactError, match=WRITTEN + ".* after it was loaded") as caught:
            draw(opened)
    assert "copy=True" in str(caught.value)


def test_a_file_that_holds_what_it_held_is_let_pass(opened, artifact_copy):
    want = draw(opened)
    write_into(weight_file(artifact_copy), lambda data: data)
    assert torch.equal(draw(opened), want)


def test_a_file_that_is_replaced_or_gone_is_no_matter(opened, artifact_copy, tmp_path):
    want = draw(opened)
    path = weight_file(artifact_copy)
    shutil.copy(path, tmp_path / "new")
    write_into(tmp_path / "new")
    os.replace(tmp_path / "new", path)
    assert torch.equal(draw(opened), want)
    shutil.rmtree(artifact_copy)
    assert torch.equal(draw(opened), want)


@pytest.mark.parametrize("trust", ["hash", "size"])
def test_a_file_that_is_written_to_between_hash_and_map_is_named(artifact_copy, cache_dir, monkeypatch, trust):
    map_weights = artifact.map_weights

    def write_and_map(*args):
        write_into(weight_file(artifact_copy))
        return map_weights(*args)

    monkeypatch.setattr(artifact, "map_weights", write_and_map)
    with pytest.raises(ArtifactError, match=WRITTEN + " while it was loaded"):
        load(artifact_copy, cache_dir=cache_dir, trust=trust)


def test_a_copy_is_drawn_with_whatever_is_written(artifact_copy, cache_dir):
    pipe = load(artifact_copy, cache_dir=cache_dir, copy=True)
    want = draw(pipe)
    maps = Path("/proc/self/maps").read_text("utf-8")
    write_into(weight_file(artifact_copy))
    with weight_file(artifact_copy).open("r+b") as file:
        file.truncate(0)  # of a mapped file this ends the process
    assert torch.equal(draw(pipe), want)
    assert str(artifact_copy) not in maps
    assert "prebake-weights" in maps
    pipe.close()
    assert "prebake-weights" not in Path("/proc/self/maps").read_text("utf-8")


def test_what_was_copied_is_hashed(artifact_copy, cache_dir, monkeypatch):
    """A write between the first hash and the copy."""
    copy_files = artifact.copy_files

    @contextmanager
    def write_and_copy(*args):
        write_into(weight_file(artifact_copy))
        with copy_files(*args) as copies:
            yield copies

    monkeypatch.setattr(artifact, "copy_files", write_and_copy)
    with pytest.raises(ArtifactError, match="sha256 is"):
        load(artifact_copy, cache_dir=cache_dir, copy=True)
