"""Who signed an artifact: a folder, its manifest and a public key come in; what the key does not vouch for comes out.

`signature.json` lies beside the manifest: an OpenSSF model signature of the package `model-signing`, which is a sigstore
bundle around an in-toto statement that lists every file of the artifact with its sha256, `manifest.json` included. No file
is hashed here: the statement is held against the manifest's own bytes and against the hashes that it lists, so whoever
hashes the files against the manifest (`check.hash_problems`) holds them against the signature. `exporter/sign.py` writes it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..bounds import MAX_MANIFEST_BYTES, parse_json
from ..errors import ArtifactError, RecipeError, first_line
from ..manifest import MANIFEST_FILE, Manifest
from ..storage.files import read_plain_file

SIGNATURE_FILE = "signature.json"
UNSIGNED_PATHS = (
    SIGNATURE_FILE,
    "reports",
)  # named in the signature, so that model-signing's own verifier leaves them out too
MAX_SIGNATURE_BYTES = 64 << 20  # bytes: some 400,000 files; reading a signature must not be a way to fill memory
SIGN_EXTRA_HINT = "a signature needs model-signing: pip install 'prebake[sign]'"


@dataclass(frozen=True)
class Identity:
    """Someone who signs by sigstore: `name` is an e-mail address or a workflow's URL, `issuer` the URL of who says so."""

    name: str
    issuer: str

    def __str__(self) -> str:
        return f"{self.name} ({self.issuer})"


def signature_problems(folder: Path, manifest: Manifest, public_key: Path | str | Identity) -> Iterator[str]:
    """Why the artifact is not one that the holder of `public_key` signed; nothing where it is.

    `public_key` is a PEM file of an elliptic curve key, P-256, P-384 or P-521; an `Identity` is asked for at sigstore's
    servers. The files themselves are compared by `check.file_problems` and `check.hash_problems`.
    Raises RecipeError for a file that is no such key, or where the package is not installed, and ArtifactError where sigstore's
    servers are not reached, or the manifest is no longer what was read.
    """
    verifying = verifier_of(public_key)
    file = folder / SIGNATURE_FILE
    if not file.is_file():
        yield f'{SIGNATURE_FILE} is missing, so nobody has signed the artifact; sign it with `prebake sign`, or load it with trust="hash"'
    elif file.stat().st_size > MAX_SIGNATURE_BYTES:
        yield f"{SIGNATURE_FILE} has {file.stat().st_size} bytes, {MAX_SIGNATURE_BYTES} at most are expected; sign the artifact again"
    else:
        yield from _statement_problems(folder, file, manifest, verifying, public_key)


def coverage_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Why a signature that lies there cannot hold, whoever's it is: what it signs is not this artifact. Nothing without one.

    No key is asked for, so this says nothing about who has signed.
    """
    try:
        said = signed_resources(read_plain_file(folder, SIGNATURE_FILE, MAX_SIGNATURE_BYTES + 1))
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{SIGNATURE_FILE} is no signature of an artifact; sign it again, or remove the file"
        return
    there = signed_hashes(folder, manifest)
    if other := sorted(path for path in said.keys() | there.keys() if said.get(path) != there.get(path)):
        more = f" and {len(other) - 1} files more" if len(other) > 1 else ""
        yield (
            f"{SIGNATURE_FILE} is of another state of the artifact: {other[0]}{more} changed since; sign it again with "
            "`prebake sign`, or restore what was signed"
        )


def signed_resources(bundle: bytes) -> dict[str, str]:
    """Path -> sha256, as the bundle says without proof. Raises ValueError, KeyError or TypeError for what is no bundle."""
    if len(bundle) > MAX_SIGNATURE_BYTES:
        raise ValueError("too large")
    statement = parse_json(base64.b64decode(parse_json(bundle)["dsseEnvelope"]["payload"]))
    return {str(each["name"]): str(each["digest"]) for each in statement["predicate"]["resources"]}


def release_problems(manifest: Manifest, minimum: int | None) -> Iterator[str]:
    """Why an artifact is older than what is asked for: an older one is as well signed as the latest."""
    if minimum is not None and manifest.release < minimum:
        came = f"is release {manifest.release}" if manifest.release else "has no number of a release"
        yield f"{came}, at least {minimum} was asked for; get the newer one, or ask for less"


def _statement_problems(
    folder: Path, file: Path, manifest: Manifest, verifying: Any, public_key: Path | str | Identity
) -> Iterator[str]:
    hashes = signed_hashes(folder, manifest)
    listed = known_hashing_config(hashes)
    try:
        verifying.set_hashing_config(listed).verify(folder, file)
    except Exception as e:  # it is a stranger's file, and the package's parsers raise many kinds
        if not listed.reached:  # it compares files last
            yield f"{SIGNATURE_FILE} is no signature by {public_key} ({error_clause(e)}); ask for the signer's key, or do not open the artifact"
        else:
            yield f"manifest.json is not the one that was signed by {public_key}; restore the file, or sign the artifact again"


def error_clause(e: Exception) -> str:
    """What it says, as a part of a sentence; its name, where it says nothing."""
    return first_line(e).rstrip(". ") or type(e).__name__


def verifier_of(public_key: Path | str | Identity) -> Any:
    """A `model_signing.verifying.Config` for that key or person. Raises as `signature_problems` does."""
    try:
        from model_signing import verifying
    except ModuleNotFoundError as e:
        raise RecipeError(SIGN_EXTRA_HINT) from e
    if isinstance(public_key, Identity):
        try:
            return verifying.Config().use_sigstore_verifier(identity=public_key.name, oidc_issuer=public_key.issuer)
        except Exception as e:  # of many kinds: sigstore's servers are asked for their own keys here
            raise ArtifactError(
                f"{SIGNATURE_FILE} cannot be held against {public_key}: sigstore was not reached ({error_clause(e)}); it needs a network, "
                "and a public key needs none"
            ) from e
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError) as e:  # the last two: a key of another kind
        raise RecipeError(
            f"{public_key}: expected a public key in PEM, of an elliptic curve P-256, P-384 or P-521, and it is none "
            f"({type(e).__name__}); `openssl ec -in KEY -pubout` writes one"
        ) from e


def signed_hashes(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Path -> sha256 of everything that a signature covers: the listed files, and `manifest.json`, read here.

    Raises ArtifactError where the file no longer says what `manifest` says.
    """
    path = folder / "manifest.json"
    try:
        raw = read_plain_file(folder, MANIFEST_FILE, MAX_MANIFEST_BYTES + 1)
        same = Manifest.model_validate(parse_json(raw)) == manifest
    except (OSError, ValueError):
        same, raw = False, b""
    if not same:
        raise ArtifactError(f"{path}: has changed since it was read; open the artifact again")
    return {entry.path: entry.sha256 for entry in manifest.files} | {"manifest.json": hashlib.sha256(raw).hexdigest()}


def known_hashing_config(hashes: Mapping[str, str]) -> Any:
    """What stands in for model-signing's hashing: the hashes that are known. `reached` says whether they were asked for,
    which the package does once the signature itself holds."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest  # public modules take it and give it back, and none has its name

    class Listed(hashing.Config):
        reached = False

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            self.reached = True
            kind = manifest.SerializationType.from_args(
                {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": UNSIGNED_PATHS}
            )
            items = [
                manifest.FileManifestItem(path=PurePosixPath(path), digest=Digest("sha256", bytes.fromhex(sha256)))
                for path, sha256 in hashes.items()
            ]
            return manifest.Manifest(Path(model_path).resolve().name, items, kind)

    return Listed()
