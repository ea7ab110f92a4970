"""What `push` and `pull` between folders refuse: before anything large is fetched, and what a signature does not hold for."""

from __future__ import annotations

import subprocess

import pytest

from prebake.exporter.cli.main import main
from prebake.runtime.errors import ArtifactError
from prebake.runtime.transfer.folder import FolderOrigin
from prebake.runtime.transfer.progress import TransferProgress
from prebake.runtime.transfer.push import push
from support.transfer_artifacts import (
    PACKAGE,
    PLAN,
    WEIGHTS,
    Flipping,
    Noting,
    flip,
    held,
    paper,
    pulled,
    refused,
)

pytestmark = pytest.mark.usefixtures("private_cache")


def never_fetched(artifact, target, **choices) -> list[str]:
    """The sentences, without the folder's name; nothing but the manifest has been fetched."""
    noted = Noting()
    lines = refused(ArtifactError, pulled, FolderOrigin(artifact), target, noted, **choices)
    assert noted.files == []
    assert not target.parent.exists()
    return [line.removeprefix(f"{artifact}: ") for line in lines]


def test_no_artifact(tmp_path, target):
    assert never_fetched(tmp_path / "absent", target) == ["expected an artifact folder, found nothing"]
    (tmp_path / "empty").mkdir()
    assert never_fetched(tmp_path / "empty", target) == [
        "expected an artifact, which has a manifest.json, and there is none"
    ]
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    (line,) = never_fetched(tmp_path / "empty", target)
    assert "[schema_version]: this runtime reads version 2, the file says None" in line


def test_an_artifact_of_another_machine(artifact, target, tmp_path):
    paper.edit(artifact, lambda raw: raw["requires"].update(machine="sparc64"))
    (line,) = never_fetched(artifact, target)
    assert line.startswith("was compiled for Linux sparc64, this machine is ")
    push(artifact, str(tmp_path / "mirror"), force=False, bar=TransferProgress())
    assert held(tmp_path / "mirror") == held(artifact)
    assert main(["pull", str(artifact), str(target), "--any-machine", "--quiet"]) == 0
    assert held(target) == held(artifact)


def test_any_machine_still_compares_every_file(artifact, target):
    paper.edit(artifact, lambda raw: raw["requires"].update(machine="sparc64"))
    lines = refused(ArtifactError, pulled, Flipping(artifact, PACKAGE), target, any_machine=True)
    assert lines[0].startswith(f"{artifact}: {PACKAGE}: sha256 is ")


@pytest.mark.parametrize("name", ["../outside", "/outside", "graphs/../../outside", "manifest.json", "reports/x"])
def test_names_that_lead_elsewhere(artifact, target, name):
    paper.edit(artifact, lambda raw: raw["files"][0].update(path=name))
    assert any(line.startswith(f"manifest.json [files]: {name!r} ") for line in never_fetched(artifact, target))


def test_a_failed_artifact(artifact, target):
    paper.edit(artifact, lambda raw: raw.update(status="failed"))
    assert never_fetched(artifact, target) == ["missed its thresholds, and its manifest says so; pull one that holds"]


def test_links_are_not_followed(artifact, target, tmp_path):
    """Neither one among the files nor one among the reports, which nobody has hashed."""
    (tmp_path / "secret").write_text("not for others")
    (artifact / "reports" / "link").symlink_to(tmp_path / "secret")
    (line,) = refused(ArtifactError, pulled, FolderOrigin(artifact), target)
    assert line.startswith(f"{artifact}: reports/link cannot be opened as a plain file")
    assert not target.exists()


def test_a_report_whose_name_could_lead_elsewhere_is_left_out(artifact, target):
    (artifact / "reports" / "a:b").write_text("x")
    noted = Noting()
    pulled(FolderOrigin(artifact), target, noted)
    assert noted.notes == ["'reports/a:b' is left out: it is not a plain name inside the folder"]
    assert sorted(held(target)) == sorted(held(artifact).keys() - {"reports/a:b"})


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path):
    """(private, public) of two signers."""
    pytest.importorskip("model_signing", reason="model-signing is not installed: pip install 'prebake[sign]'")
    found = []
    for name in ("mine", "other"):
        key, public = tmp_path / f"{name}.key", tmp_path / f"{name}.pub"
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
        subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
        found.append((key, public))
    return found


def test_a_signature_travels_and_is_asked_for(artifact, target, keys, capsys):
    (key, public), (_, other) = keys
    assert main(["sign", str(artifact), "--key", str(key)]) == 0
    (line,) = never_fetched(artifact, target, public_key=other)
    assert line.startswith(f"signature.json is no signature by {other} ")
    assert main(["pull", str(artifact), str(target), "--public-key", str(public), "--quiet"]) == 0
    assert held(target) == held(artifact)
    assert main(["verify", str(target), "--signature", "--public-key", str(public)]) == 0


def test_an_unsigned_artifact_is_refused_where_a_key_is_given(artifact, target, keys):
    (line,) = never_fetched(artifact, target, public_key=keys[0][1])
    assert line.startswith("signature.json is missing")


def test_a_manifest_that_fits_damaged_weights_is_refused_by_the_signature(artifact, target, keys):
    """What the hashes alone cannot tell."""
    (key, public), _ = keys
    assert main(["sign", str(artifact), "--key", str(key)]) == 0
    signature = (artifact / "signature.json").read_bytes()
    (artifact / "signature.json").unlink()
    flip(artifact / WEIGHTS)
    paper.relist(artifact)
    paper.edit(artifact, lambda raw: raw.update(files=[f for f in raw["files"] if not f["path"].startswith("reports")]))
    (artifact / "signature.json").write_bytes(signature)
    assert never_fetched(artifact, target, public_key=public)[0].startswith(
        "manifest.json is not the one that was signed"
    )
    pulled(FolderOrigin(artifact), target)  # the canary: without a key it is taken


# --- what is not pushed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda a: flip(a / WEIGHTS), f"{WEIGHTS}: sha256 is "),
        (lambda a: (a / PLAN).unlink(), f"{PLAN} is missing, the manifest lists it; "),
        (lambda a: (a / "notes.txt").touch(), "notes.txt is not in the manifest; remove it"),
        (lambda a: (a / "reports/x").symlink_to("/etc/hostname"), "reports/x is a symbolic link"),
        (lambda a: paper.edit(a, lambda raw: raw.update(status="failed")), "missed its thresholds"),
        (
            lambda a: paper.edit(a, lambda raw: raw["plans"].update(x="plans/x.json")),
            "manifest.json: 'plans/x.json' is ",
        ),
    ],
    ids=["damaged", "missing", "unlisted", "link", "failed", "plan"],
)
def test_what_is_not_right_here_is_not_pushed(artifact, target, damage, sentence):
    damage(artifact)
    lines = refused(ArtifactError, push, artifact, str(target), force=True, bar=TransferProgress())
    assert any(line.startswith(f"{artifact}: {sentence}") for line in lines), lines
    assert not target.parent.exists()
