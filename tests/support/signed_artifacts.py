"""Signed artifacts on paper, the keys of their signers, and what changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("model_signing", reason="model-signing is not installed: pip install 'prebake[sign]'")

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from prebake.exporter.package import folder as package
from prebake.exporter.package.sign import verify_signed_artifact
from prebake.runtime.check.signature import signature_problems
from prebake.runtime.errors import ArtifactError
from prebake.runtime.manifest import read_manifest

WEIGHTS = "weights/denoiser.safetensors"
FILES = 4  # three that the manifest lists, and itself


def write_keys(folder: Path, name: str, private) -> tuple[Path, Path]:
    key, public = folder / f"{name}.pem", folder / f"{name}.pub"
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return key, public


def problems(folder, public):
    return list(signature_problems(folder, read_manifest(folder), public))


def refused(folder, public) -> list[str]:
    """The lines of the one ArtifactError, without the folder's name."""
    with pytest.raises(ArtifactError) as e:
        verify_signed_artifact(folder, public)
    return [line.removeprefix(f"{folder}: ") for line in str(e.value).splitlines()]


def changed(folder):
    """What `prebake plan` and a verification do to a manifest."""
    manifest = read_manifest(folder)
    with package.stage_linked_copy(folder) as fresh:
        package.update_manifest(fresh, manifest.model_copy(update={"status": "verified"}), manifest)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
