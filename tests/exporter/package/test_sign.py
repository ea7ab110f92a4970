"""Signing and checking who signed, on an artifact on paper; model-signing's own signer and verifier are the peers."""

from __future__ import annotations

import base64
import errno
import json
import os
import shlex
import subprocess
import sys

import pytest

from support.paths import ROOT

pytest.importorskip("model_signing", reason="model-signing is not installed: pip install 'prebake[sign]'")

import model_signing
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from prebake.exporter.cli.main import main
from prebake.exporter.package import sign as signs
from prebake.exporter.package.sign import SigstoreSigner, sign_artifact, verify_signed_artifact
from prebake.runtime.check.signature import Identity
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError
from support import paper_artifact as paper
from support.signed_artifacts import FILES, WEIGHTS, changed, flip, problems, write_keys

# what changes a signed artifact


def test_a_change_takes_a_signature_out_and_says_so(signed, keys):
    notes = []
    with signs.keep_signed(signed, None, notes.append):
        changed(signed)
    assert not (signed / "signature.json").exists()
    (note,) = notes
    assert note.startswith("signature.json was of the artifact as it was before, and is gone; `prebake sign ")


def test_a_change_with_the_key_is_signed_again(signed, keys):
    notes = []
    with signs.keep_signed(signed, keys[0], notes.append):
        changed(signed)
    assert (problems(signed, keys[1]), notes) == ([], [])


def test_what_did_not_change_keeps_its_signature(signed, keys):
    before, notes = (signed / "signature.json").read_bytes(), []
    with signs.keep_signed(signed, keys[0], notes.append):
        pass
    assert ((signed / "signature.json").read_bytes(), notes) == (before, [])


def test_a_key_that_is_none_stops_a_change_before_it_begins(signed, keys):
    with pytest.raises(RecipeError, match="expected a private key"), signs.keep_signed(signed, keys[1], print):
        pytest.fail("it began")


@pytest.mark.parametrize("command", [["plan", "--remove", "9"], ["verify", "--source"]])
def test_plan_and_verify_watch_the_signature(signed, capsys, monkeypatch, command):
    """Whatever the command does inside: here it changes the manifest and no more."""
    from prebake.exporter import add_plan
    from prebake.exporter.verify import verify

    def change(folder, *_):
        changed(folder)
        raise ArtifactError("it ends here")

    monkeypatch.setattr(add_plan, "remove_plan", change)
    monkeypatch.setattr(verify, "verify_artifact", change)
    assert main([command[0], str(signed), *command[1:], "--quiet"]) == 5
    assert "signature.json was of the artifact as it was before, and is gone" in capsys.readouterr().err


# good ones


def test_a_signed_artifact_holds(signed, keys):
    assert problems(signed, keys[1]) == []
    assert verify_signed_artifact(signed, keys[1]) == FILES


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_other_curves(artifact, tmp_path, curve):
    key, public = write_keys(tmp_path, "other", ec.generate_private_key(curve))
    sign_artifact(artifact, key)
    assert verify_signed_artifact(artifact, public) == FILES


def test_keys_of_openssl_as_the_page_says(artifact, tmp_path):
    """The two commands of docs/how-to/sign.md."""
    page = (ROOT / "docs/how-to/sign.md").read_text("utf-8")
    commands = [line for line in page.splitlines() if line.startswith("openssl ec")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command.split("  #")[0], shell=True, cwd=tmp_path, check=True, capture_output=True)
    sign_artifact(artifact, tmp_path / "prebake.key")
    assert verify_signed_artifact(artifact, tmp_path / "prebake.pub") == FILES


def test_model_signing_itself_reads_it(signed, keys):
    """Its verifier hashes every file anew, with no option, and refuses a changed one."""
    peer = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    (signed / "reports/log.txt").write_text("reports are free")
    peer.verify(signed, signed / "signature.json")
    flip(signed / WEIGHTS)
    with pytest.raises(ValueError, match=f"Hash mismatch for '{WEIGHTS}'"):
        peer.verify(signed, signed / "signature.json")


def test_the_command_of_model_signing_as_the_page_says(signed, keys):
    page = (ROOT / "docs/how-to/sign.md").read_text("utf-8")
    (command,) = (line for line in page.splitlines() if line.startswith("model_signing "))
    command = command.replace("artifacts/flux-fast-shapes", str(signed)).replace("prebake.pub", str(keys[1]))
    _, *arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_model_signing_itself_signed_holds(artifact, keys):
    free = model_signing.hashing.Config().set_ignored_paths(paths=["signature.json", "reports"])
    peer = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0]).set_hashing_config(free)
    peer.sign(artifact, artifact / "signature.json")
    assert verify_signed_artifact(artifact, keys[1]) == FILES


def test_a_copy_under_another_name_holds(signed, keys, tmp_path):
    moved = signed.rename(tmp_path / "moved")
    assert verify_signed_artifact(moved, keys[1]) == FILES


def test_signing_again_replaces_the_signature(signed, keys, tmp_path):
    key, public = write_keys(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    sign_artifact(signed, key)
    assert verify_signed_artifact(signed, public) == FILES
    assert problems(signed, keys[1]) != []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "mine.pem", "mine.pub", "other.pem", "other.pub"]


def test_the_key_is_not_in_the_signature(signed, keys):
    secret = keys[0].read_text().splitlines()[1]
    statement = json.loads((signed / "signature.json").read_text())
    payload = base64.b64decode(statement["dsseEnvelope"]["payload"]).decode()
    assert WEIGHTS in payload
    assert secret not in payload + (signed / "signature.json").read_text()


# keys and packages


@pytest.mark.parametrize(("content", "kind"), [(None, "FileNotFoundError"), ("no key", "ValueError")])
def test_a_file_that_is_no_key(signed, tmp_path, content, kind):
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RecipeError) as e:
        problems(signed, file)
    assert str(e.value) == (
        f"{file}: expected a public key in PEM, of an elliptic curve P-256, P-384 or P-521, and it is none ({kind}); "
        "`openssl ec -in KEY -pubout` writes one"
    )
    with pytest.raises(RecipeError) as e:
        sign_artifact(signed, file)
    assert str(e.value) == (
        f"--key {file}: expected a private key in PEM, of an elliptic curve P-256, P-384 or P-521, without a password, and it "
        f"is none ({kind}); `openssl ecparam -name prime256v1 -genkey -noout -out KEY` makes one"
    )


def test_keys_of_another_kind(signed, tmp_path):
    key, public = write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    with pytest.raises(RecipeError, match="expected a public key in PEM, of an elliptic curve"):
        problems(signed, public)
    with pytest.raises(RecipeError, match="expected a private key in PEM, of an elliptic curve"):
        sign_artifact(signed, key)


def test_without_the_package(signed, keys, monkeypatch):
    for name in ("model_signing", "model_signing.verifying", "model_signing.signing"):
        monkeypatch.setitem(sys.modules, name, None)
    for refusing in (lambda: problems(signed, keys[1]), lambda: sign_artifact(signed, keys[0])):
        with pytest.raises(RecipeError) as e:
            refusing()
        assert str(e.value) == "a signature needs model-signing: pip install 'prebake[sign]'"


# what is not signed


def test_a_damaged_artifact_is_not_signed(artifact, keys):
    flip(artifact / WEIGHTS)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS}: sha256 is "):
        sign_artifact(artifact, keys[0])
    assert not (artifact / "signature.json").exists()


def test_a_failed_artifact_is_not_signed(artifact, keys):
    paper.edit(artifact, lambda raw: raw.update(status="failed"))
    with pytest.raises(ArtifactError) as e:
        sign_artifact(artifact, keys[0])
    assert str(e.value) == f"{artifact}: missed its thresholds, and its manifest says so; sign one that holds"


def test_an_artifact_for_another_machine_is_signed(artifact, keys):
    paper.edit(artifact, lambda raw: raw["requires"].update(machine="pdp11"))
    sign_artifact(artifact, keys[0])
    assert verify_signed_artifact(artifact, keys[1]) == FILES


def test_sigstore_out_of_reach_says_so(signed, monkeypatch, capsys):
    """What happens within reach needs sigstore's servers, and is not tested."""

    def offline(self, **options):
        raise RuntimeError("no route to host.\nand more")

    monkeypatch.setattr(model_signing.signing.Config, "use_sigstore_signer", offline)
    monkeypatch.setattr(model_signing.verifying.Config, "use_sigstore_verifier", offline)
    said = "it needs a network and a token, and --key needs neither"
    assert main(["sign", str(signed), "--sigstore"]) == 3
    assert capsys.readouterr().err == (
        f"prebake: error: --sigstore: sigstore did not sign (no route to host); {said}\n"
    )
    monkeypatch.setattr(model_signing.signing.Config, "use_sigstore_signer", lambda self, **options: self)
    monkeypatch.setattr(model_signing.signing.Config, "sign", offline_sign)
    assert main(["sign", str(signed), "--sigstore"]) == 3
    assert capsys.readouterr().err == f"prebake: error: --sigstore: sigstore did not sign (no token); {said}\n"
    arguments = ["--signature", "--identity", "me", "--issuer", "https://x"]
    assert main(["verify", str(signed), *arguments]) == 5
    assert capsys.readouterr().err == (
        "prebake: error: signature.json cannot be held against me (https://x): sigstore was not reached (no route to host); "
        "it needs a network, and a public key needs none\n"
    )


def offline_sign(self, folder, target):
    raise ConnectionError("no token")


def test_a_signature_that_cannot_be_written(signed, keys, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (signed / "signature.json").read_bytes()
    monkeypatch.setattr(signs.os, "replace", full)
    with pytest.raises(ExportError) as e:
        sign_artifact(signed, keys[0])
    assert str(e.value) == (
        f"{signed / 'signature.json'}: cannot be written (No space left on device); make room, or sign a copy"
    )
    assert (signed / "signature.json").read_bytes() == before


# the command line


def test_commands(artifact, keys, capsys):
    assert main(["sign", str(artifact), "--key", str(keys[0])]) == 0
    assert capsys.readouterr().out == f"{artifact}/signature.json: 4 files signed\n"
    arguments = ["verify", str(artifact), "--signature", "--public-key", str(keys[1])]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{artifact}: signed by {keys[1]}, 4 files are as signed\n"
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"artifact": str(artifact), "signed_by": str(keys[1]), "files": FILES}
    flip(artifact / WEIGHTS)
    assert main(arguments) == 5
    assert capsys.readouterr().err.startswith(f"prebake: error: {artifact}: {WEIGHTS}: sha256 is ")


def test_sign_json(artifact, keys, capsys):
    assert main(["sign", str(artifact), "--key", str(keys[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"signature": f"{artifact}/signature.json", "files": FILES}


def test_the_token_of_sigstore_comes_from_the_environment(artifact, monkeypatch):
    seen = []
    monkeypatch.setattr(signs, "sign_artifact", lambda folder, signer, release: seen.append(signer) or 1)
    monkeypatch.delenv("SIGSTORE_ID_TOKEN", raising=False)
    main(["sign", str(artifact), "--sigstore"])
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", "secret")
    main(["sign", str(artifact), "--sigstore"])
    assert seen == [SigstoreSigner(None), SigstoreSigner("secret")]


def test_an_identity_is_handed_over(artifact, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(signs, "verify_signed_artifact", lambda folder, whose: seen.append(whose) or 1)
    arguments = ["--identity", "me@example.org", "--issuer", "https://example.org"]
    assert main(["verify", str(artifact), "--signature", *arguments]) == 0
    assert seen == [Identity("me@example.org", "https://example.org")]
    assert capsys.readouterr().out == (
        f"{artifact}: signed by me@example.org (https://example.org), 1 files are as signed\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--signature"], "--signature: expected --public-key FILE, or --identity NAME with --issuer URL, got neither"),
        (["--signature", "--identity", "me"], "--identity and --issuer: expected both or none, since anyone can vouch for a name"),
        (["--signature", "--public-key", "x", "--issuer", "y"], "--identity and --issuer: expected both or none, since anyone can vouch for a name"),
        (["--signature", "--public-key", "x", "--source"], "--signature: opens no code, so nothing can be drawn; verify once more without it"),
        (["--public-key", "x"], "--public-key: says who must have signed the artifact; add --signature, or leave it out"),
        (["--identity", "x"], "--identity: says who must have signed the artifact; add --signature, or leave it out"),
        (["--issuer", "x"], "--issuer: says who must have signed the artifact; add --signature, or leave it out"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(artifact, capsys, arguments, said):
    assert main(["verify", str(artifact), *arguments]) == 2
    assert capsys.readouterr().err == f"prebake: error: {said}\n"
