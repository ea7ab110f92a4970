"""What `trust` compares, what is hashed a second time, and files that change between the check and their use."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from prebake.runtime import PrebakeError, artifact
from prebake.runtime.artifact import open_artifact
from prebake.runtime.check import artifact as check
from prebake.runtime.manifest import read_manifest
from prebake.runtime.storage import files
from prebake.runtime.storage import hash_marker as verified
from support.paper_artifact import library, write_package

WEIGHTS = "weights/denoiser.safetensors"
PACKAGE = "graphs/denoiser.pt2"


@pytest.fixture
def hashed(monkeypatch):
    """Counts the files that are hashed in the check."""
    seen = []
    real = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda descriptor: seen.append(descriptor) or real(descriptor))
    return seen


@pytest.fixture
def aged(monkeypatch):
    """Files that were written just now count as old, so that markers are written."""
    monkeypatch.setattr(verified, "RECENT_NS", 0)


@pytest.fixture
def marker(paper, opens, aged, tmp_path):
    """The marker that a load of the paper artifact has left."""
    open_artifact(paper)
    (path,) = (tmp_path / "cache/prebake/verified").iterdir()
    return path


def others(path):
    """Overwrites the weights by others of the same size, in the same inode."""
    save_file({"denoiser.w": torch.full((3,), 7.0)}, path.with_name("other"))
    path.write_bytes(path.with_name("other").read_bytes())
    path.with_name("other").unlink()


def refusal(paper, **kwargs):
    with pytest.raises(PrebakeError) as caught:
        open_artifact(paper, **kwargs)
    return str(caught.value)


# --- policies ---------------------------------------------------------------------------------------------------------


def test_hash_is_the_policy_when_nothing_is_said(paper, opens):
    others(paper / WEIGHTS)
    assert f"{WEIGHTS}: sha256 is" in refusal(paper)


def test_by_size_weights_are_not_read_twice(paper, opens, hashed):
    others(paper / WEIGHTS)
    assert open_artifact(paper, trust="size").weights["denoiser.w"].tolist() == [7.0] * 3
    assert len(hashed) == len(read_manifest(paper).files) - 1


def test_by_size_weights_of_another_size_are_refused(paper, opens):
    (paper / WEIGHTS).write_bytes(b"short")
    assert f"{WEIGHTS} has 5 bytes, the manifest says" in refusal(paper, trust="size")


def test_by_size_weights_that_change_their_size_after_the_first_look_are_refused(paper, opens, monkeypatch):
    expected = (paper / WEIGHTS).stat().st_size

    def later(folder, manifest):
        yield from ()
        (paper / WEIGHTS).write_bytes(b"short")

    monkeypatch.setattr(check, "file_problems", later)
    said = refusal(paper, trust="size")
    assert said == (f"{paper}: {WEIGHTS} has 5 bytes, the manifest says {expected}; restore the file or export again")


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({"trust": "blindly"}, "trust='blindly': expected one of hash, signature, size"),
        (
            {"trust": "signature"},
            "trust='signature': expected public_key, the file of the key of whoever signed the artifact",
        ),
        (
            {"public_key": "x.pem"},
            "public_key: trust='hash' does not ask for a signature; give trust='signature' with it",
        ),
        (
            {"trust": "size", "public_key": "x.pem"},
            "public_key: trust='size' does not ask for a signature; give trust='signature' with it",
        ),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(paper, never_opened, policy, sentence):
    assert refusal(paper, **policy) == sentence


def test_a_signature_is_asked_for_before_anything_is_hashed(paper, never_opened, hashed, monkeypatch):
    asked = []

    def signature_problems(folder, manifest, key):
        asked.append((folder, manifest, key))
        yield "nobody signed it"

    monkeypatch.setattr(check, "signature_problems", signature_problems)
    assert refusal(paper, trust="signature", public_key="x.pem") == f"{paper}: nobody signed it"
    assert asked == [(paper, read_manifest(paper), "x.pem")]
    assert hashed == []


def test_a_signed_artifact_is_hashed_too(paper, never_opened, monkeypatch):
    monkeypatch.setattr(check, "signature_problems", lambda *_: iter(()))
    others(paper / WEIGHTS)
    assert f"{WEIGHTS}: sha256 is" in refusal(paper, trust="signature", public_key="x.pem")


# --- hashed once ------------------------------------------------------------------------------------------------------


def test_the_second_load_hashes_nothing_in_its_check(paper, marker, hashed):
    open_artifact(paper)
    assert hashed == []


def test_code_is_hashed_in_each_load_as_it_is_read(paper, marker, monkeypatch):
    write_package(paper / PACKAGE, so=library().replace(b"ELF\x02\x01\x01\x00", b"ELF\x02\x01\x01\x01"))
    monkeypatch.setattr(verified.HashMarker, "is_valid", lambda self: True)
    assert f"{PACKAGE}: sha256 is" in refusal(paper)


def test_a_marker_is_not_written_while_a_later_change_could_show_the_same_time(paper, opens, tmp_path):
    open_artifact(paper)
    assert not (tmp_path / "cache/prebake/verified").exists()


def test_a_marker_is_not_written_for_a_file_that_changes_while_it_is_hashed(paper, opens, aged, monkeypatch, tmp_path):
    real = files.sha256_of

    def slow(descriptor):
        digest = real(descriptor)
        os.utime(paper / WEIGHTS)
        return digest

    monkeypatch.setattr(files, "sha256_of", slow)
    open_artifact(paper)
    assert not (tmp_path / "cache/prebake/verified").exists()


def changed(paper, marker):
    before = (paper / WEIGHTS).stat()
    others(paper / WEIGHTS)
    os.utime(paper / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))  # as one does who hides it
    assert (paper / WEIGHTS).stat().st_mtime_ns == before.st_mtime_ns


def replaced(paper, marker):
    before = (paper / WEIGHTS).stat()
    fresh = paper.parent / "fresh"
    fresh.write_bytes((paper / WEIGHTS).read_bytes())
    others(fresh)
    os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
    fresh.rename(paper / WEIGHTS)


@pytest.mark.parametrize("damage", [changed, replaced])
def test_a_file_that_was_touched_is_hashed_again(paper, marker, damage):
    damage(paper, marker)
    assert f"{WEIGHTS}: sha256 is" in refusal(paper)


def no_json(paper, marker):
    marker.write_text("{")


def deep(paper, marker):
    marker.write_text("[" * 100_000)


def empty(paper, marker):
    marker.write_text("")


def of_another_manifest(paper, marker):
    said = json.loads(marker.read_text())
    marker.write_text(json.dumps(said | {"manifest": "0" * 64}))


def of_fewer_files(paper, marker):
    said = json.loads(marker.read_text())
    del said["files"][WEIGHTS]
    marker.write_text(json.dumps(said))


def linked(paper, marker):
    marker.rename(marker.with_name("x"))
    marker.symlink_to("x")


def writable(paper, marker):
    marker.chmod(0o666)


def in_a_writable_folder(paper, marker):
    marker.parent.chmod(0o777)


def in_a_writable_cache(paper, marker):
    marker.parent.parent.chmod(0o777)


TAMPERED = [
    no_json,
    deep,
    empty,
    of_another_manifest,
    of_fewer_files,
    linked,
    writable,
    in_a_writable_folder,
    in_a_writable_cache,
]


@pytest.mark.parametrize("tamper", TAMPERED)
def test_a_marker_that_is_not_ours_or_not_whole_is_not_believed(paper, marker, hashed, tamper):
    tamper(paper, marker)
    open_artifact(paper)
    assert len(hashed) == len(read_manifest(paper).files)


def test_another_users_cache_is_neither_believed_nor_written(paper, marker, hashed, monkeypatch):
    before = marker.read_bytes(), marker.stat().st_mtime_ns
    somebody = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody)
    open_artifact(paper)
    assert len(hashed) == len(read_manifest(paper).files)
    assert (marker.read_bytes(), marker.stat().st_mtime_ns) == before


def test_a_copy_has_a_marker_of_its_own_and_one_folder_never_two(paper, marker, hashed, tmp_path):
    import shutil

    copy = shutil.copytree(paper, tmp_path / "copy")
    open_artifact(copy)
    assert len(hashed) == len(read_manifest(paper).files)
    (paper / "reports/later").write_text("")
    os.utime(paper / WEIGHTS)
    open_artifact(paper)
    assert len(list(marker.parent.iterdir())) == 2
    hashed.clear()
    open_artifact(paper)
    open_artifact(copy)
    assert hashed == []


# --- between the check and the use ------------------------------------------------------------------------------------


def once_checked(monkeypatch, change):
    """Runs `change` when everything is checked and nothing is read yet."""
    real = artifact.read_plans
    monkeypatch.setattr(artifact, "read_plans", lambda *args: (change(), real(*args))[1])


def test_weights_that_are_replaced_after_the_check_are_not_the_ones_that_are_mapped(paper, opens, monkeypatch):
    def change():
        save_file({"denoiser.w": torch.full((3,), 7.0)}, paper.parent / "other")
        (paper.parent / "other").rename(paper / WEIGHTS)

    once_checked(monkeypatch, change)
    assert open_artifact(paper).weights["denoiser.w"].tolist() == [1.0] * 3


def test_a_mapping_outlives_its_descriptor_and_its_name(paper, opens):
    opened = open_artifact(paper)
    (paper / WEIGHTS).unlink()
    assert opened.weights["denoiser.w"].tolist() == [1.0] * 3
    assert opens[0].constants["w"].data_ptr() == opened.weights["denoiser.w"].data_ptr()


@pytest.mark.parametrize("path", ["plans/2.json", PACKAGE])
def test_what_is_read_is_hashed_from_what_was_read(paper, never_opened, monkeypatch, path):
    once_checked(monkeypatch, lambda: (paper / path).write_text("{}"))
    assert refusal(paper).startswith(f"{paper}: {path}: sha256 is 44136fa355b3.., the manifest says ")


@pytest.mark.parametrize("path", ["plans/2.json", PACKAGE])
def test_a_link_in_its_place_is_not_followed(paper, never_opened, monkeypatch, path):
    def change():
        (paper / path).rename(paper.parent / "elsewhere")
        (paper / path).symlink_to(paper.parent / "elsewhere")

    once_checked(monkeypatch, change)
    assert refusal(paper) == (
        f"{paper}: {path} cannot be opened as a plain file (Too many levels of symbolic links); "
        "restore the file or export again"
    )


def test_a_link_in_place_of_its_folder_is_not_followed(paper, never_opened, monkeypatch):
    def change():
        (paper / "plans").rename(paper.parent / "elsewhere")
        (paper / "plans").symlink_to(paper.parent / "elsewhere")

    once_checked(monkeypatch, change)
    assert f"{paper}: plans/2.json cannot be opened as a plain file (Not a directory)" in refusal(paper)


def test_a_pipe_in_its_place_is_not_waited_for(paper, never_opened, monkeypatch):
    def change():
        (paper / "plans/2.json").unlink()
        os.mkfifo(paper / "plans/2.json")

    once_checked(monkeypatch, change)
    assert refusal(paper) == f"{paper}: plans/2.json is not a plain file; restore the file or export again"


def test_no_descriptor_is_left_behind(paper, opens):
    open_artifact(paper)
    before = sorted(os.listdir("/proc/self/fd"))
    open_artifact(paper)
    others(paper / WEIGHTS)
    refusal(paper)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# --- hashing ----------------------------------------------------------------------------------------------------------


def test_files_are_hashed_as_hashlib_does(tmp_path):
    import hashlib

    contents = {
        f"{n}": os.urandom(n) for n in (0, 1, files.BLOCK_BYTES - 1, files.BLOCK_BYTES, 3 * files.BLOCK_BYTES + 5)
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with files.open_files(tmp_path, contents) as descriptors:
        assert files.file_hashes(descriptors) == {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()}
