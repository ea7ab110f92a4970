"""Pulls an artifact: a place where one lies and the name of a folder come in, and the folder is there, whole, or is as it was.

The manifest comes first, so that an artifact for another machine, by another signer or with names that lead elsewhere costs no
download. Files are gathered in a private folder beside the target, `.NAME.pull`, which outlives a pull that is interrupted:
what lies in it with the right hash is not fetched again. Once everything is there, all of it is compared as `load` compares,
and one rename puts it in place. Nothing of it is opened as code.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..bounds import MAX_MANIFEST_BYTES
from ..check.artifact import (
    MANIFEST_FILE,
    UNCHECKED_FOLDER,
    file_name_problems,
    file_problems,
    hash_problems,
    is_plain_name,
    open_checked_files,
    reference_problems,
)
from ..check.machine import machine_problems
from ..check.signature import MAX_SIGNATURE_BYTES, release_problems, signature_problems
from ..check.signature import SIGNATURE_FILE as SIGNATURE
from ..errors import ArtifactError, RecipeError, raise_problems
from ..manifest import FileEntry, Manifest, read_manifest
from ..storage.files import FOLDER_FLAGS, file_hashes, open_files, read_plain_file
from ..storage.private_folder import is_private_folder
from ..storage.rename import is_artifact, make_readable, replace_folder, replacement_problem
from .progress import TransferProgress


class Origin(Protocol):
    """Where an artifact lies: `folder.py` and `hub.py` have one each. `str` of it is what the user wrote."""

    @property
    def revision(self) -> str | None:
        """The commit that is read, where the place has such."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Path -> bytes, of at least the manifest, the signature and the reports that are there."""
        ...

    def fetch(self, files: Mapping[str, int], into: Path, bar: TransferProgress) -> None:
        """Writes these files, of so many bytes, into a folder. Raises ArtifactError for what does not come."""
        ...


@dataclass(frozen=True)
class PullOptions:
    """`public_key`: the PEM file of who must have signed it. `any_machine`: also what this machine could not run.
    `minimum_release`: of what was signed, nothing older."""

    public_key: Path | None = None
    any_machine: bool = False
    force: bool = False
    minimum_release: int | None = None


@dataclass(frozen=True)
class TransferResult:
    """An artifact of `files` files and `size` bytes is at `place`. `fetched` and `fetched_bytes`, or None where nobody knows,
    are what moved for it now, reports included."""

    place: str
    revision: str | None
    files: int
    size: int
    fetched: int | None
    fetched_bytes: int | None


def pull(origin: Origin, target: Path, choices: PullOptions, bar: TransferProgress) -> TransferResult:
    """Fetches, compares and puts in place the artifact at `origin`. Raises ArtifactError for what is no artifact, is damaged, or is for another machine, and RecipeError where something is
    in the way at `target`. The same artifact may be there: it is compared, and nothing is fetched."""
    target = target.resolve()
    with tempfile.TemporaryDirectory(prefix="prebake-") as temporary:
        ahead = Path(temporary)
        manifest = fetch_manifest(origin, ahead, choices, bar)
        if is_same_artifact(ahead, target) and not choices.force:
            bar.begin("verify")
            with attribute_errors(target, target, "fetch it again with --force"):
                compare_files(target, manifest, choices)
            return transfer_result(origin, target, manifest, {})
        refuse_existing_target(target, force=choices.force)
        with lock_stage(target) as stage:
            fetched = fetch_missing(origin, stage, manifest, target, bar)
            shutil.copytree(ahead, stage, dirs_exist_ok=True)
            make_readable(
                stage, target if is_artifact(target) else None
            )  # before it is compared: a later change of mode would look like one of content
            bar.begin("verify")
            with attribute_errors(
                origin, stage, f"{target} is as it was; pull again, and only what is wrong is fetched"
            ):
                compare_files(stage, manifest, choices)
            refuse_existing_target(target, force=choices.force)
            replace_folder(stage, target)
            shutil.rmtree(stage, ignore_errors=True)  # where the earlier artifact is now
    return transfer_result(origin, target, manifest, fetched)


def transfer_result(origin: Origin, target: Path, manifest: Manifest, fetched: Mapping[str, int]) -> TransferResult:
    size = sum(entry.size for entry in manifest.files)
    return TransferResult(str(target), origin.revision, len(manifest.files), size, len(fetched), sum(fetched.values()))


# --- before anything large is fetched ---------------------------------------------------------------------------------


def fetch_manifest(origin: Origin, ahead: Path, choices: PullOptions, bar: TransferProgress) -> Manifest:
    """The manifest, fetched into the folder `ahead` with its signature. Raises ArtifactError where the rest is not wanted."""
    sizes = origin.sizes()
    if MANIFEST_FILE not in sizes:
        raise ArtifactError(f"{origin}: expected an artifact, which has a {MANIFEST_FILE}, and there is none")
    first = {path: sizes[path] for path in (MANIFEST_FILE, SIGNATURE) if path in sizes}
    for path, size in first.items():
        if size > (most := MAX_MANIFEST_BYTES if path == MANIFEST_FILE else MAX_SIGNATURE_BYTES):
            raise ArtifactError(f"{origin}: {path} has {size} bytes, at most {most} are read of such a file")
    origin.fetch(first, ahead, TransferProgress())
    with attribute_errors(origin, ahead):
        manifest = read_manifest(ahead)
        if manifest.status == "failed":
            raise ArtifactError(f"{ahead}: missed its thresholds, and its manifest says so; pull one that holds")
        raise_problems(ahead, [*file_name_problems(manifest), *reference_problems(manifest)])
        if not choices.any_machine:
            raise_problems(ahead, machine_problems(manifest))
        if choices.public_key:
            raise_problems(ahead, signature_problems(ahead, manifest, choices.public_key))
            raise_problems(ahead, release_problems(manifest, choices.minimum_release))
        elif choices.minimum_release is not None:
            raise RecipeError("--minimum-release: anyone can write another number; give --public-key with it")
    return manifest


def is_same_artifact(ahead: Path, target: Path) -> bool:
    """Whether manifest and signature at the target are those that were fetched."""
    try:
        return all(read_optional(ahead, name) == read_optional(target, name) for name in (MANIFEST_FILE, SIGNATURE))
    except OSError:
        return False


def read_optional(folder: Path, name: str) -> bytes | None:
    try:
        return read_plain_file(folder, name, MAX_SIGNATURE_BYTES + 1)
    except FileNotFoundError:
        return None


def refuse_existing_target(target: Path, *, force: bool) -> None:
    """Raises RecipeError unless `target` is free, or an artifact that may be replaced."""
    if not target.exists():
        return
    if not force:
        raise RecipeError(f"{target}: already exists, and is not that artifact; replace it with --force")
    if problem := replacement_problem(target):
        raise RecipeError(f"{target}: --force replaces artifacts only, and {problem}; choose another folder")


# --- fetching ---------------------------------------------------------------------------------------------------------


@contextmanager
def lock_stage(target: Path) -> Iterator[Path]:
    """The private folder beside `target`, for one process at a time. It stays where the block raises.

    Raises ArtifactError where another process has it, or where there is no such folder of this user.
    """
    stage = target.with_name(f".{target.name}.pull")
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir(mode=0o700, exist_ok=True)
        if not is_private_folder(stage):
            raise PermissionError(1, f"{stage} is no folder of this user alone")
        descriptor = os.open(stage, FOLDER_FLAGS | os.O_NOFOLLOW)
    except OSError as e:
        raise ArtifactError(f"{target}: cannot be written ({e.strerror}); choose another folder") from e
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), stage.stat()):  # it was put in place meanwhile
            raise BlockingIOError
        yield stage
    except BlockingIOError as e:
        raise ArtifactError(f"{target}: another process is fetching it; wait for that one") from e
    except OSError as e:
        raise ArtifactError(f"{target}: cannot be written ({e.strerror or e}); make room, or choose another") from e
    finally:
        os.close(descriptor)


def fetch_missing(
    origin: Origin, stage: Path, manifest: Manifest, earlier: Path, bar: TransferProgress
) -> dict[str, int]:
    """Fetches into `stage` what is not there yet; path -> bytes of that. Anything else in `stage` is removed."""
    bar.begin("compare")
    clear_stage(stage, manifest)
    link_unchanged(earlier, stage, [entry for entry in manifest.files if not (stage / entry.path).exists()])
    listed = {e.path: e.size for e in manifest.files if not (stage / e.path).exists()}
    there = origin.sizes()
    for path, size in listed.items():
        if there.get(path, size) != size:
            raise ArtifactError(f"{origin}: {path} has {there[path]} bytes, the manifest says {size}; push it again")
    wanted = listed | report_sizes(origin, bar)
    free = shutil.disk_usage(stage).free
    if sum(wanted.values()) > free:
        raise ArtifactError(f"{origin}: has {sum(wanted.values())} bytes to fetch, {free} are free here; make room")
    if wanted:
        origin.fetch(wanted, stage, bar)
    return wanted


def clear_stage(stage: Path, manifest: Manifest) -> None:
    """Leaves in the folder what the manifest lists and has its hash, and nothing besides."""
    right = matching_paths(stage, manifest.files)
    for path in sorted(stage.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty
                path.rmdir()
        elif path.relative_to(stage).as_posix() not in right:
            path.unlink()


def matching_paths(folder: Path, entries: Iterable[FileEntry]) -> set[str]:
    """The paths of those files that are in the folder, as plain ones, and have their size and hash."""
    there = [e for e in entries if has_size(folder / e.path, e.size)]
    try:
        with open_files(folder, [entry.path for entry in there]) as files:
            came = file_hashes(files)
    except ArtifactError:  # a link on the way to one of them
        return set()
    return {entry.path for entry in there if came[entry.path] == entry.sha256}


def has_size(path: Path, size: int) -> bool:
    try:
        return path.lstat().st_size == size
    except OSError:
        return False


def link_unchanged(earlier: Path, stage: Path, entries: list[FileEntry]) -> None:
    """Takes from an earlier artifact of this user what has not changed, as hard links, where the file system has those."""
    if not is_artifact(earlier) or not is_private_folder(earlier):
        return
    for path in sorted(matching_paths(earlier, entries)):
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            os.link(earlier / path, stage / path)


def report_sizes(origin: Origin, bar: TransferProgress) -> dict[str, int]:
    """Path -> bytes, of what lies under reports/ there. A name that could lead elsewhere is left out, and it is said."""
    found: dict[str, int] = {}
    for path, size in origin.sizes().items():
        if path.startswith(f"{UNCHECKED_FOLDER}/") and is_plain_name(path):
            found[path] = size
        elif path.startswith(f"{UNCHECKED_FOLDER}/"):
            bar.note(f"{path!r} is left out: it is not a plain name inside the folder")
    return found


# --- what arrived -----------------------------------------------------------------------------------------------------


def compare_files(folder: Path, manifest: Manifest, choices: PullOptions) -> None:
    """Raises ArtifactError unless every file is as the manifest says, and the manifest as the signature says."""
    if not choices.any_machine:
        trust = "signature" if choices.public_key else "hash"
        with open_checked_files(folder, manifest, trust=trust, public_key=choices.public_key):
            return
    raise_problems(folder, [*file_name_problems(manifest), *reference_problems(manifest)])
    raise_problems(folder, file_problems(folder, manifest))
    if choices.public_key:
        raise_problems(folder, signature_problems(folder, manifest, choices.public_key))
    raise_problems(folder, hash_problems(folder, manifest))


@contextmanager
def attribute_errors(name: object, folder: Path, way_out: str = "") -> Iterator[None]:
    """Attributes an ArtifactError about the folder to `name`; `way_out` is its last line, where there is one."""
    try:
        yield
    except ArtifactError as e:
        said = str(e).replace(str(folder), str(name))
        raise ArtifactError(f"{said}\n{name}: {way_out}" if way_out else said) from e
