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

from ..check.artifact import (
    FREE,
    checked,
    file_problems,
    hash_problems,
    is_plain_name,
    name_problems,
    reference_problems,
)
from ..check.machine import machine_problems
from ..check.signature import FILE as SIGNATURE
from ..check.signature import signature_problems
from ..errors import ArtifactError, RecipeError, raise_all
from ..manifest import FileEntry, Manifest, read_manifest
from ..storage.files import FOLDER, hashes_of, opened
from ..storage.private import is_private
from ..storage.rename import is_artifact, make_readable, replace
from .progress import Bar

MANIFEST = "manifest.json"


class Origin(Protocol):
    """Where an artifact lies: `folder.py` and `hub.py` have one each. `str` of it is what the user wrote."""

    @property
    def revision(self) -> str | None:
        """The commit that is read, where the place has such."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Path -> bytes, of at least the manifest, the signature and the reports that are there."""
        ...

    def fetch(self, files: Mapping[str, int], into: Path, bar: Bar) -> None:
        """Writes these files, of so many bytes, into a folder. Raises ArtifactError for what does not come."""
        ...


@dataclass(frozen=True)
class Choices:
    """`public_key`: the PEM file of who must have signed it. `any_machine`: also what this machine could not run."""

    public_key: Path | None = None
    any_machine: bool = False
    force: bool = False


@dataclass(frozen=True)
class Moved:
    """An artifact of `files` files and `size` bytes is at `place`. `fetched` and `fetched_bytes`, or None where nobody knows,
    are what moved for it now, reports included."""

    place: str
    revision: str | None
    files: int
    size: int
    fetched: int | None
    fetched_bytes: int | None


def pull(origin: Origin, target: Path, choices: Choices, bar: Bar) -> Moved:
    """Raises ArtifactError for what is no artifact, is damaged, or is for another machine, and RecipeError where something is
    in the way at `target`. The same artifact may be there: it is compared, and nothing is fetched."""
    target = target.resolve()
    with tempfile.TemporaryDirectory(prefix="prebake-") as temporary:
        ahead = Path(temporary)
        manifest = accepted(origin, ahead, choices, bar)
        if same(ahead, target) and not choices.force:
            bar.begin("verify")
            with said_of(target, target, "fetch it again with --force"):
                compare(target, manifest, choices)
            return moved(origin, target, manifest, {})
        refuse_existing(target, force=choices.force)
        with stage_of(target) as stage:
            fetched = gather(origin, stage, manifest, target, bar)
            shutil.copytree(ahead, stage, dirs_exist_ok=True)
            make_readable(stage)  # before it is compared: a later change of mode would look like one of content
            bar.begin("verify")
            with said_of(origin, stage, f"{target} is as it was; pull again, and only what is wrong is fetched"):
                compare(stage, manifest, choices)
            refuse_existing(target, force=choices.force)
            replace(stage, target)
            shutil.rmtree(stage, ignore_errors=True)  # where the earlier artifact is now
    return moved(origin, target, manifest, fetched)


def moved(origin: Origin, target: Path, manifest: Manifest, fetched: Mapping[str, int]) -> Moved:
    size = sum(entry.size for entry in manifest.files)
    return Moved(str(target), origin.revision, len(manifest.files), size, len(fetched), sum(fetched.values()))


# --- before anything large is fetched ---------------------------------------------------------------------------------


def accepted(origin: Origin, ahead: Path, choices: Choices, bar: Bar) -> Manifest:
    """The manifest, fetched into the folder `ahead` with its signature. Raises ArtifactError where the rest is not wanted."""
    sizes = origin.sizes()
    if MANIFEST not in sizes:
        raise ArtifactError(f"{origin}: expected an artifact, which has a {MANIFEST}, and there is none")
    origin.fetch({path: sizes[path] for path in (MANIFEST, SIGNATURE) if path in sizes}, ahead, Bar())
    with said_of(origin, ahead):
        manifest = read_manifest(ahead)
        if manifest.status == "failed":
            raise ArtifactError(f"{ahead}: missed its thresholds, and its manifest says so; pull one that holds")
        raise_all(ahead, [*name_problems(manifest), *reference_problems(manifest)])
        if not choices.any_machine:
            raise_all(ahead, machine_problems(manifest))
        if choices.public_key:
            raise_all(ahead, signature_problems(ahead, manifest, choices.public_key))
    return manifest


def same(ahead: Path, target: Path) -> bool:
    """Whether manifest and signature at the target are those that were fetched."""
    try:
        return all(content(ahead / name) == content(target / name) for name in (MANIFEST, SIGNATURE))
    except OSError:
        return False


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raises RecipeError unless `target` is free, or an artifact that may be replaced."""
    if not target.exists():
        return
    if not force:
        raise RecipeError(f"{target}: already exists, and is not that artifact; replace it with --force")
    if not is_artifact(target) and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target}: --force replaces artifacts only, and this is none; choose another folder")


# --- fetching ---------------------------------------------------------------------------------------------------------


@contextmanager
def stage_of(target: Path) -> Iterator[Path]:
    """The private folder beside `target`, for one process at a time. It stays where the block raises.

    Raises ArtifactError where another process has it, or where there is no such folder of this user.
    """
    stage = target.with_name(f".{target.name}.pull")
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir(mode=0o700, exist_ok=True)
        if not is_private(stage):
            raise PermissionError(1, f"{stage} is no folder of this user alone")
        descriptor = os.open(stage, FOLDER | os.O_NOFOLLOW)
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


def gather(origin: Origin, stage: Path, manifest: Manifest, earlier: Path, bar: Bar) -> dict[str, int]:
    """Fetches into `stage` what is not there yet; path -> bytes of that. Anything else in `stage` is removed."""
    bar.begin("compare")
    clear(stage, manifest)
    link(earlier, stage, [entry for entry in manifest.files if not (stage / entry.path).exists()])
    wanted = {e.path: e.size for e in manifest.files if not (stage / e.path).exists()} | reports(origin, bar)
    free = shutil.disk_usage(stage).free
    if sum(wanted.values()) > free:
        raise ArtifactError(f"{origin}: has {sum(wanted.values())} bytes to fetch, {free} are free here; make room")
    if wanted:
        origin.fetch(wanted, stage, bar)
    return wanted


def clear(stage: Path, manifest: Manifest) -> None:
    """Leaves in the folder what the manifest lists and has its hash, and nothing besides."""
    right = whole(stage, manifest.files)
    for path in sorted(stage.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty
                path.rmdir()
        elif path.relative_to(stage).as_posix() not in right:
            path.unlink()


def whole(folder: Path, entries: Iterable[FileEntry]) -> set[str]:
    """The paths of those files that are in the folder, as plain ones, and have their size and hash."""
    there = [e for e in entries if is_sized(folder / e.path, e.size)]
    try:
        with opened(folder, [entry.path for entry in there]) as files:
            came = hashes_of(files)
    except ArtifactError:  # a link on the way to one of them
        return set()
    return {entry.path for entry in there if came[entry.path] == entry.sha256}


def is_sized(path: Path, size: int) -> bool:
    try:
        return path.lstat().st_size == size
    except OSError:
        return False


def link(earlier: Path, stage: Path, entries: list[FileEntry]) -> None:
    """Takes from an earlier artifact of this user what has not changed, as hard links, where the file system has those."""
    if not is_artifact(earlier) or not is_private(earlier):
        return
    for path in sorted(whole(earlier, entries)):
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            os.link(earlier / path, stage / path)


def reports(origin: Origin, bar: Bar) -> dict[str, int]:
    """Path -> bytes, of what lies under reports/ there. A name that could lead elsewhere is left out, and it is said."""
    found: dict[str, int] = {}
    for path, size in origin.sizes().items():
        if path.startswith(f"{FREE}/") and is_plain_name(path):
            found[path] = size
        elif path.startswith(f"{FREE}/"):
            bar.note(f"{path!r} is left out: it is not a plain name inside the folder")
    return found


# --- what arrived -----------------------------------------------------------------------------------------------------


def compare(folder: Path, manifest: Manifest, choices: Choices) -> None:
    """Raises ArtifactError unless every file is as the manifest says, and the manifest as the signature says."""
    if not choices.any_machine:
        trust = "signature" if choices.public_key else "hash"
        with checked(folder, manifest, trust=trust, public_key=choices.public_key):
            return
    raise_all(folder, [*name_problems(manifest), *reference_problems(manifest)])
    raise_all(folder, file_problems(folder, manifest))
    if choices.public_key:
        raise_all(folder, signature_problems(folder, manifest, choices.public_key))
    raise_all(folder, hash_problems(folder, manifest))


@contextmanager
def said_of(name: object, folder: Path, way_out: str = "") -> Iterator[None]:
    """What is wrong with the folder is said of `name`, and `way_out` is the last line, where there is one."""
    try:
        yield
    except ArtifactError as e:
        said = str(e).replace(str(folder), str(name))
        raise ArtifactError(f"{said}\n{name}: {way_out}" if way_out else said) from e
