"""Files that are cut short or have one bit flipped, each kind of file in each kind of place; with the manifest as it was,
and with one that was made to fit."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from safetensors import safe_open

import prebake.runtime.backends.aoti
from prebake.runtime import ArtifactError
from prebake.runtime.artifact import open_artifact
from prebake.runtime.manifest import read_manifest
from support.paper_artifact import library, relist, write_package

PACKAGE, PLAN, WEIGHTS = "graphs/denoiser.pt2", "plans/2.json", "weights/denoiser.safetensors"
TOKENIZER, GOLDEN = "tokenizers/tokenizer/tokenizer.json", "golden/2.safetensors"


@pytest.fixture
def whole(paper, monkeypatch, tmp_path):
    """A good artifact with every kind of file; code is never opened."""
    (paper / TOKENIZER).parent.mkdir(parents=True)
    (paper / TOKENIZER).write_text('{"version": "1.0"}')
    (paper / GOLDEN).parent.mkdir()
    (paper / GOLDEN).write_bytes((paper / WEIGHTS).read_bytes())
    write_package(paper / PACKAGE, so=library() + b"code" * 100)
    relist(paper)

    def opened(so: Path, device: object, runners: int) -> None:
        raise AssertionError(f"{so} was opened")

    monkeypatch.setattr(prebake.runtime.backends.aoti, "open_model", opened)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return paper


def header_end(data: bytes) -> int:
    """Where the data of a safetensors file begins."""
    return 8 + struct.unpack("<Q", data[:8])[0]


PLACES = {
    # place: (file, where in its bytes)
    "a zip's local header": (PACKAGE, lambda d: d.index(b"PK\3\4") + 2),
    "a library's header": (PACKAGE, lambda d: d.index(b"\x7fELF") + 4),
    "machine code": (PACKAGE, lambda d: d.index(b"codecode") + 100),
    "a library's metadata": (PACKAGE, lambda d: d.index(b"{}")),
    "a zip's directory": (PACKAGE, lambda d: d.index(b"PK\1\2") + 16),
    "a zip's last record": (PACKAGE, lambda d: d.index(b"PK\5\6") + 12),
    "a plan's JSON": (PLAN, lambda d: d.index(b"evaluations") + 3),
    "a plan's number": (PLAN, lambda d: d.index(b"1000.0")),
    "the length of a weight file's header": (WEIGHTS, lambda d: 1),
    "a weight file's header": (WEIGHTS, lambda d: d.index(b"dtype")),
    "a weight": (WEIGHTS, lambda d: header_end(d) + 5),
    "a tokenizer": (TOKENIZER, lambda d: 5),
    "a golden vector": (GOLDEN, lambda d: header_end(d) + 5),
}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_artifact(folder)
    return str(caught.value).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")


def test_the_whole_one_gets_as_far_as_its_code(whole):
    with pytest.raises(AssertionError, match=r"a\.wrapper\.so was opened"):
        open_artifact(whole)


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_told_by_its_hash(whole, place):
    path, at = PLACES[place]
    flip(whole / path, at((whole / path).read_bytes()))
    assert refusal(whole).startswith(f"{path}: sha256 is ")


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_is_cut_is_told_by_its_size(whole, place):
    path, at = PLACES[place]
    data = (whole / path).read_bytes()
    (whole / path).write_bytes(data[: at(data)])
    assert refusal(whole) == (
        f"{path} has {at(data)} bytes, the manifest says {len(data)}; restore the file or export again"
    )


# The manifest is made to fit. What says something of itself is refused all the same; the rest is another artifact, and only a
# signature tells whose: a plan's number, a weight, a tokenizer, a golden vector.
FLIPPED = {
    "a zip's local header": f"{PACKAGE}: expected a .pt2 package, but Bad magic number for file header",
    "a library's header": f"{PACKAGE}: expected a .pt2 package, but Bad CRC-32 for file",
    "a library's metadata": f"{PACKAGE}: expected a .pt2 package, but Bad CRC-32 for file",
    "machine code": f"{PACKAGE}: expected a .pt2 package, but Bad CRC-32 for file",
    "a zip's directory": f"{PACKAGE}: expected a .pt2 package, but Bad CRC-32 for file",
    "a zip's last record": f"{PACKAGE}: expected a .pt2 package, but ",
    "a plan's JSON": f"{PLAN} [evaluations]: Field required",
    "the length of a weight file's header": f"{WEIGHTS}: expected safetensors, but ",
    "a weight file's header": f"{WEIGHTS}: expected safetensors, but ",
}
CUT = {
    PACKAGE: f"{PACKAGE}: expected a .pt2 package, but File is not a zip file",
    PLAN: f"{PLAN}: expected JSON, but ",
    WEIGHTS: f"{WEIGHTS}: expected safetensors, but ",
}


@pytest.mark.parametrize("place", FLIPPED)
def test_a_flipped_bit_that_is_listed(whole, place):
    path, at = PLACES[place]
    flip(whole / path, at((whole / path).read_bytes()))
    relist(whole)
    assert refusal(whole).startswith(FLIPPED[place])


@pytest.mark.parametrize("place", [place for place, (path, _) in PLACES.items() if path in CUT])
def test_a_file_that_is_cut_and_listed(whole, place):
    path, at = PLACES[place]
    data = (whole / path).read_bytes()
    (whole / path).write_bytes(data[: at(data)])
    relist(whole)
    assert refusal(whole).startswith(CUT[path])


# --- the manifest, which no hash is of -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.99])
def test_a_manifest_that_is_cut(whole, share):
    data = (whole / "manifest.json").read_bytes()
    (whole / "manifest.json").write_bytes(data[: int(share * len(data))])
    assert refusal(whole).startswith("manifest.json: expected JSON, but ")


def test_every_bit_of_a_hash_counts(whole):
    (entry, *_), text = read_manifest(whole).files, (whole / "manifest.json").read_text()
    for at in range(0, 64, 7):
        other = entry.sha256[:at] + ("1" if entry.sha256[at] == "0" else "0") + entry.sha256[at + 1 :]
        (whole / "manifest.json").write_text(text.replace(entry.sha256, other))
        assert refusal(whole).startswith(f"{entry.path}: sha256 is {entry.sha256[:12]}")


def test_every_character_of_a_manifests_syntax_counts(whole):
    """One bit of each brace, bracket, colon, comma and quote."""
    data = (whole / "manifest.json").read_bytes()
    places = [i for i, c in enumerate(data) if c in b'{}[]:,"'][::7]
    assert len(places) > 50
    for at in places:
        (whole / "manifest.json").write_bytes(data)
        flip(whole / "manifest.json", at)
        assert "manifest.json" in refusal(whole)


# --- packages of the matrix that tests/format has not ----------------------------------------------------------------


def test_a_library_that_is_cut_behind_its_header(whole):
    so = library({"libc.so.6": ["GLIBC_2.2.5"]})
    write_package(whole / PACKAGE, so=so[:-1])
    relist(whole)
    assert refusal(whole).splitlines()[0] == (
        f"{PACKAGE}, full/a.wrapper.so: expected a shared library, but its segments lead out of the file; "
        "restore the file or export again"
    )


def test_an_archive_of_another_version(whole):
    data = (whole / PACKAGE).read_bytes()
    write_package(whole / PACKAGE, extra=[("other/archive_version", "1")])
    relist(whole)
    assert refusal(whole) == (
        f"{PACKAGE}: archive_version is '1', this runtime reads '0'; "
        "export again with this prebake, or install the one that wrote it"
    )
    assert b"archive_version" in data


def test_not_a_number_among_the_weights_is_found_by_its_hash(whole):
    with safe_open(whole / WEIGHTS, "pt") as file:
        assert file.get_tensor("denoiser.w").tolist() == [1.0] * 3
    data = bytearray((whole / WEIGHTS).read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    (whole / WEIGHTS).write_bytes(data)
    assert refusal(whole).startswith(f"{WEIGHTS}: sha256 is ")


def test_a_size_that_is_none(whole):
    raw = json.loads((whole / "manifest.json").read_text())
    raw["files"][0]["size"] = -1
    (whole / "manifest.json").write_text(json.dumps(raw))
    assert "[files.0.size]: Input should be greater than or equal to 0" in refusal(whole)
