"""Signs an artifact: a folder and a signer come in, `signature.json` lies in the folder when it returns.

Every file is hashed against the manifest first, so what is signed is what is there. The signature then lists each of them
with that hash, in the format of model-signing (OpenSSF), so that its own verifier reads it as well as
`runtime/signature.py`, which says what is signed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.bounds import MAX_MANIFEST_BYTES
from ...runtime.check.artifact import file_name_problems, file_problems, hash_problems
from ...runtime.check.signature import (
    SIGN_EXTRA_HINT,
    SIGNATURE_FILE,
    Identity,
    error_clause,
    known_hashing_config,
    signature_problems,
    signed_hashes,
)
from ...runtime.errors import ArtifactError, ExportError, RecipeError, raise_problems
from ...runtime.manifest import MANIFEST_FILE, Manifest, read_manifest
from ...runtime.storage.files import read_plain_file
from .folder import stage_linked_copy, update_manifest


@dataclass(frozen=True)
class SigstoreSigner:
    """Signing by sigstore, which needs a network: with a token, else with what the CI gives, else a browser is opened."""

    token: str | None = None


def sign_artifact(folder: Path, signer: Path | SigstoreSigner, release: int | None = None) -> int:
    """Writes `signature.json`, in place of an earlier one, and returns the number of files that it covers. The manifest has
    the number `release` from then on, where one is given.

    `signer` is a PEM file of a private elliptic curve key (P-256, P-384 or P-521) without a password, or sigstore. The artifact
    need not be one that this machine can run. Raises ArtifactError for one that is not as its manifest says or that missed its
    thresholds, RecipeError for a key that is none, and ExportError where sigstore or the disk refuses.
    """
    signing = signing_config(signer)
    manifest = read_manifest(folder)
    if manifest.status == "failed":
        raise ArtifactError(f"{folder}: missed its thresholds, and its manifest says so; sign one that holds")
    check_files(folder, manifest)
    if release is not None:
        manifest = set_release(folder, manifest, release)
    hashes = signed_hashes(folder, manifest)
    signing.set_hashing_config(known_hashing_config(hashes))
    try:
        write_signature(signing, folder, signer)
    except OSError as e:
        raise ExportError(
            f"{folder / SIGNATURE_FILE}: cannot be written ({e.strerror or e}); make room, or sign a copy"
        ) from e
    return len(hashes)


def set_release(folder: Path, manifest: Manifest, release: int) -> Manifest:
    """The manifest with that number, written. Raises RecipeError for one that is lower than the manifest's."""
    if release < max(manifest.release, 1):
        raise RecipeError(f"--release {release}: expected {max(manifest.release, 1)} or more; releases are counted up")
    if release == manifest.release:
        return manifest
    with stage_linked_copy(folder.resolve()) as fresh:
        return update_manifest(fresh, manifest.model_copy(update={"release": release}), manifest)


@contextlib.contextmanager
def keep_signed(folder: Path, key: Path | None, note: Callable[[str], None]) -> Iterator[None]:
    """Around what may change an artifact: with `key` it is signed again if it was changed, and else it is said that its
    signature is gone. Raises as `sign_artifact` does, for a key that is none before anything is done."""
    signed, before = (folder / SIGNATURE_FILE).is_file(), manifest_bytes(folder)
    if key is not None:
        signing_config(key)
    try:
        yield
    finally:  # also where the command ends in an error later on
        if manifest_bytes(folder) != before:
            if key is not None:
                sign_artifact(folder, key)
            elif signed:
                note(
                    f"{SIGNATURE_FILE} was of the artifact as it was before, and is gone; `prebake sign {folder} --key FILE` "
                    "signs it again"
                )


def manifest_bytes(folder: Path) -> bytes | None:
    try:
        return read_plain_file(folder, MANIFEST_FILE, MAX_MANIFEST_BYTES + 1)
    except OSError:  # the command itself says so
        return None


def verify_signed_artifact(folder: Path, whose: Path | Identity) -> int:
    """The number of files that `whose` signed and that are as signed: all. No code is opened, whatever machine it is for.

    Raises ArtifactError with everything that is wrong, and RecipeError for a file that is no public key.
    """
    manifest = read_manifest(folder)
    check_names(folder, manifest)
    raise_problems(folder, [*signature_problems(folder, manifest, whose), *hash_problems(folder, manifest, True)])
    return len(manifest.files) + 1


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises ArtifactError unless every file is there, listed, and what the manifest says it is."""
    check_names(folder, manifest)
    raise_problems(folder, hash_problems(folder, manifest, True))


def check_names(folder: Path, manifest: Manifest) -> None:
    raise_problems(folder, file_name_problems(manifest))
    raise_problems(folder, file_problems(folder, manifest))


def signing_config(signer: Path | SigstoreSigner) -> Any:
    """A `model_signing.signing.Config`. Raises as `sign_artifact` does for what is no key, or for sigstore."""
    try:
        from model_signing import signing
    except ModuleNotFoundError as e:
        raise RecipeError(SIGN_EXTRA_HINT) from e
    if isinstance(signer, SigstoreSigner):
        try:
            return signing.Config().use_sigstore_signer(
                identity_token=signer.token, use_ambient_credentials=signer.token is None
            )
        except Exception as e:
            raise sigstore_error(e) from e
    try:
        return signing.Config().use_elliptic_key_signer(private_key=signer)
    except (OSError, ValueError, TypeError, AttributeError) as e:  # the last two: with a password, or of another kind
        raise RecipeError(
            f"--key {signer}: expected a private key in PEM, of an elliptic curve P-256, P-384 or P-521, without a password, "
            f"and it is none ({type(e).__name__}); `openssl ecparam -name prime256v1 -genkey -noout -out KEY` makes one"
        ) from e


def write_signature(signing: Any, folder: Path, signer: Path | SigstoreSigner) -> None:
    """Signs into a file of another name, which then takes the place of `signature.json`: there is never half of one."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.resolve().name}.", dir=folder.resolve().parent) as beside:
        fresh = Path(beside) / SIGNATURE_FILE
        try:
            signing.sign(folder, fresh)
        except Exception as e:
            if isinstance(signer, SigstoreSigner):  # whose network errors are OSErrors too
                raise sigstore_error(e) from e
            raise
        os.replace(fresh, folder / SIGNATURE_FILE)


def sigstore_error(e: Exception) -> ExportError:
    """The ExportError in place of what sigstore, its network and its browser raise, which is of many kinds."""
    return ExportError(
        f"--sigstore: sigstore did not sign ({error_clause(e)}); it needs a network and a token, and --key needs neither"
    )
