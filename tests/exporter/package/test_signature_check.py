"""Signatures that do not hold, and artifacts that are older than was asked for: each is refused by name."""

from __future__ import annotations

import base64
import json
import os

import pytest

pytest.importorskip("model_signing", reason="model-signing is not installed: pip install 'prebake[sign]'")

from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prebake.exporter.cli.main import main
from prebake.exporter.package.sign import sign_artifact
from prebake.runtime.artifact import open_artifact
from prebake.runtime.backends import aoti
from prebake.runtime.check.signature import signature_problems
from prebake.runtime.errors import ArtifactError, RecipeError, RequestError
from prebake.runtime.manifest import read_manifest
from prebake.runtime.problems import artifact_problems
from support import paper_artifact as paper
from support.signed_artifacts import WEIGHTS, changed, flip, problems, refused, write_keys


def test_check_and_push_say_that_a_signature_does_not_hold(signed, capsys, tmp_path):
    signature = (signed / "signature.json").read_bytes()
    assert not [kind for kind, _ in artifact_problems(signed) if kind == "signature"]
    changed(signed)
    (signed / "signature.json").write_bytes(signature)
    (line,) = [line for kind, line in artifact_problems(signed) if kind == "signature"]
    assert line.startswith("signature.json is of another state of the artifact: manifest.json changed since")
    assert main(["check", str(signed)]) == 5
    assert main(["push", str(signed), str(tmp_path / "there"), "--quiet"]) == 5
    assert "signature.json is of another state of the artifact" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"dsseEnvelope": {"payload": "e30="}}', "[" * 100_000])
def test_check_says_that_a_signature_is_none(artifact, text):
    (artifact / "signature.json").write_text(text)
    (line,) = [line for kind, line in artifact_problems(artifact) if kind == "signature"]
    assert line.startswith("signature.json is no signature of an artifact; sign it again, or remove the file")


def test_an_older_release_is_refused_though_it_is_signed(artifact, keys, monkeypatch):
    monkeypatch.setattr(aoti, "open_model", lambda so, device, runners: paper.PaperModel(so))
    asked = {"trust": "signature", "public_key": keys[1]}
    sign_artifact(artifact, keys[0], release=3)
    assert read_manifest(artifact).release == 3
    open_artifact(artifact, minimum_release=3, **asked)
    with pytest.raises(ArtifactError, match="is release 3, at least 4 was asked for"):
        open_artifact(artifact, minimum_release=4, **asked)
    sign_artifact(artifact, keys[0], release=4)
    open_artifact(artifact, minimum_release=4, **asked)
    with pytest.raises(RecipeError, match="--release 3: expected 4 or more"):
        sign_artifact(artifact, keys[0], release=3)


def test_no_release_is_older_than_any(signed, keys, tmp_path, capsys):
    asked = {"trust": "signature", "public_key": keys[1]}
    with pytest.raises(ArtifactError, match="has no number of a release, at least 1 was asked for"):
        open_artifact(signed, minimum_release=1, **asked)
    pulling = ["pull", str(signed), str(tmp_path / "there"), "--minimum-release", "1", "--quiet"]
    assert main([*pulling, "--public-key", str(keys[1])]) == 5
    assert main(pulling) == 2
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("minimum", [True, "1", 1.0])
def test_a_minimum_is_a_whole_number(signed, keys, minimum):
    with pytest.raises(RequestError, match="expected a whole number"):
        open_artifact(signed, trust="signature", public_key=keys[1], minimum_release=minimum)


def test_a_minimum_without_a_signature_means_nothing(signed):
    with pytest.raises(RequestError, match="asks for no signature"):
        open_artifact(signed, minimum_release=1)


def test_a_release_is_in_the_manifest_only_where_it_is_said(artifact, keys):
    assert '"release"' not in (artifact / "manifest.json").read_text()
    sign_artifact(artifact, keys[0], release=1)
    assert '"release": 1' in (artifact / "manifest.json").read_text()


def test_another_key(signed, tmp_path):
    _, public = write_keys(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    mismatch = "Key mismatch: The public key hash in the signature's verification material does not match the provided public key"
    assert refused(signed, public) == [
        f"signature.json is no signature by {public} ({mismatch}); ask for the signer's key, or do not open the artifact"
    ]


def test_a_signature_that_only_claims_to_be_by_the_key(signed, keys, tmp_path):
    """Somebody else's signature with the hint of the trusted key in it."""
    file = signed / "signature.json"
    hint = json.loads(file.read_text())["verificationMaterial"]["publicKey"]["hint"]
    sign_artifact(signed, write_keys(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))[0])
    forged = json.loads(file.read_text())
    forged["verificationMaterial"]["publicKey"]["hint"] = hint
    file.write_text(json.dumps(forged))
    assert refused(signed, keys[1]) == [
        f"signature.json is no signature by {keys[1]} (InvalidSignature); ask for the signer's key, or do not open the artifact"
    ]


def test_a_changed_manifest(signed, keys):
    paper.edit(signed, lambda raw: raw["toolchain"].update(torch="1"))
    assert refused(signed, keys[1]) == [
        f"manifest.json is not the one that was signed by {keys[1]}; restore the file, or sign the artifact again"
    ]


def test_a_changed_file(signed, keys):
    assert problems(signed, keys[1]) == []
    flip(signed / WEIGHTS)
    (line,) = refused(signed, keys[1])
    assert line.startswith(f"{WEIGHTS}: sha256 is ")


def test_a_changed_file_and_a_manifest_that_fits_it(signed, keys):
    """What a hash alone cannot tell."""
    flip(signed / WEIGHTS)
    paper.relist(signed)
    # relist lists signature.json as any file; it is left out as an exporter does
    paper.edit(signed, lambda raw: raw.update(files=[f for f in raw["files"] if f["path"] != "signature.json"]))
    assert refused(signed, keys[1]) == [
        f"manifest.json is not the one that was signed by {keys[1]}; restore the file, or sign the artifact again"
    ]


def test_a_statement_that_was_edited(signed, keys):
    """The signed list changed to fit a changed manifest: the signature no longer holds."""
    file = signed / "signature.json"
    bundle = json.loads(file.read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"sha256", b"sha512", 1)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    file.write_text(json.dumps(bundle))
    (line,) = refused(signed, keys[1])
    assert line.startswith(f"signature.json is no signature by {keys[1]} (InvalidSignature)")


def test_no_signature(artifact, keys):
    assert refused(artifact, keys[1]) == [
        'signature.json is missing, so nobody has signed the artifact; sign it with `prebake sign`, or load it with trust="hash"'
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", "null", "\x00", '{"mediaType": 3}', "[" * 100_000, '{"dsseEnvelope": {"signatures": []}}'],
)
def test_a_signature_that_is_none(signed, keys, text):
    (signed / "signature.json").write_text(text)
    (line,) = refused(signed, keys[1])
    assert line.startswith(f"signature.json is no signature by {keys[1]} (")
    assert line.endswith("); ask for the signer's key, or do not open the artifact")


def test_a_signature_without_end(signed, keys):
    os.truncate(signed / "signature.json", 1 << 40)  # sparse
    assert refused(signed, keys[1]) == [
        "signature.json has 1099511627776 bytes, 67108864 at most are expected; sign the artifact again"
    ]


def test_a_linked_signature(signed, keys, tmp_path):
    (signed / "signature.json").rename(tmp_path / "elsewhere")
    (signed / "signature.json").symlink_to(tmp_path / "elsewhere")
    (line,) = refused(signed, keys[1])
    assert line.startswith("signature.json is a symbolic link")


def test_a_listed_signature_is_refused(signed, keys):
    paper.relist(signed)
    assert refused(signed, keys[1]) == ["manifest.json [files]: 'signature.json' cannot be listed; export again"]


def test_a_manifest_that_changes_while_it_is_read(signed, keys):
    manifest = read_manifest(signed)
    paper.edit(signed, lambda raw: raw["toolchain"].update(torch="1"))
    with pytest.raises(ArtifactError) as e:
        list(signature_problems(signed, manifest, keys[1]))
    assert str(e.value) == f"{signed / 'manifest.json'}: has changed since it was read; open the artifact again"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_no_damage_makes_another_manifest_signed(signed, keys, at, byte, cut):
    """One byte of the signature is another, or it ends there; the manifest is not the one that was signed."""
    whole = signed.parent / "whole"
    if not whole.exists():
        whole.write_bytes((signed / "signature.json").read_bytes())
        paper.edit(signed, lambda raw: raw["toolchain"].update(torch="1"))
    data = bytearray(whole.read_bytes())
    data[int(at * len(data))] = byte
    (signed / "signature.json").write_bytes(data[: int(at * len(data))] if cut else data)
    (line,) = problems(signed, keys[1])
    assert line.startswith(("signature.json is no signature by ", "manifest.json is not the one that was signed by "))


def test_load_asks_for_it(signed, keys, tmp_path, monkeypatch):
    """On paper, what is trusted fails at dlopen, and what is not never gets there."""
    monkeypatch.setattr(aoti, "open_model", lambda *args: pytest.fail("opened"))
    _, other = write_keys(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ArtifactError, match=f"signature.json is no signature by {other}"):
        open_artifact(signed, trust="signature", public_key=other, cache_dir=tmp_path / "cache")
    with pytest.raises(pytest.fail.Exception, match="opened"):
        open_artifact(signed, trust="signature", public_key=keys[1], cache_dir=tmp_path / "cache")
