"""Weight files that are mapped: whether somebody has written to one since, and private copies for those who must not care.

A mapped page is the file's page, so what is written into the file is drawn with at once. A file that is replaced by another one
under its name (`os.replace`, `mv`) is no matter: the one that is mapped stays as it was.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError
from .files import BLOCK_BYTES, hash_problem, open_files, sha256_of, work_on_files

if TYPE_CHECKING:
    from ..manifest import Manifest

WEIGHT_FILE_NAME = re.compile(r"weights/(?P<component>.+?)(-\d{5}-of-\d{5})?\.safetensors")
"""One file of a component, or one of its shards, named as diffusers and transformers name theirs."""
FileState = tuple[int, int, int, int]
"""Device, inode, size and time of the last change of content."""


def component_name(path: str) -> str:
    """The component whose weights a file holds, by the file's name."""
    found = WEIGHT_FILE_NAME.fullmatch(path)
    return found["component"] if found else path


def content_state(info: os.stat_result) -> FileState:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def content_states(files: Mapping[str, int]) -> dict[str, FileState]:
    """Path -> the state of the open file."""
    return {path: content_state(os.fstat(descriptor)) for path, descriptor in files.items()}


@contextmanager
def refuse_changes(folder: Path, manifest: Manifest, files: Mapping[str, int]) -> Iterator[None]:
    """Raises ArtifactError at the end of the block for an open weight file that was written to in it, and does not hold what the
    manifest says: what was hashed is not what was mapped. Other files are hashed as they are read."""
    weights = {path: descriptor for path, descriptor in files.items() if path.startswith("weights/")}
    before = content_states(weights)
    yield
    now = content_states(weights)
    for path in (path for path in weights if now[path] != before[path]):
        if sha256_of(weights[path]) != expected_sha256(manifest, path):
            raise ArtifactError(f"{folder}: {path} was written to while it was loaded; {WAY_OUT}")


def expected_sha256(manifest: Manifest, path: str) -> str:
    return next(entry.sha256 for entry in manifest.files if entry.path == path)


WAY_OUT = "write files anew beside it, rename them into its place, and load again; or load a copy of its weights: load(..., copy=True)"


class WeightFiles:
    """The files that an artifact has mapped, as they were then."""

    def __init__(self, folder: Path, manifest: Manifest, files: Mapping[str, int]):
        self._folder, self._manifest = folder, manifest
        self._states = content_states(files)

    def refuse_changed(self) -> None:
        """Raises ArtifactError for a file that was written to since: one whose state has changed is hashed, and one that holds
        what it held is let pass. A file that is there no more, or is another one, is not the one that is mapped."""
        for path, mapped in self._states.items():
            with suppress(OSError):
                now = content_state(os.stat(self._folder / path))
                if now != mapped and now[:2] == mapped[:2]:
                    self._refuse_written(path, now)

    def _refuse_written(self, path: str, now: FileState) -> None:
        with open_files(self._folder, [path]) as files:
            if sha256_of(files[path]) != expected_sha256(self._manifest, path):
                raise ArtifactError(f"{self._folder}: {path} was written to after it was loaded; {WAY_OUT}")
        self._states[path] = now


@contextmanager
def copy_files(
    folder: Path, manifest: Manifest, files: Mapping[str, int], paths: Sequence[str]
) -> Iterator[dict[str, int]]:
    """Path -> descriptor of a copy in memory that has no name, for the length of the block; what maps it keeps it.

    What was copied is hashed, so it is right whatever happens to the file meanwhile. Raises ArtifactError where it is not.
    """
    with ExitStack() as stack:

        def copied(path: str) -> tuple[int, str]:
            copy = os.memfd_create("prebake-weights", os.MFD_CLOEXEC)
            stack.callback(os.close, copy)
            return copy, copy_file(files[path], copy)

        made = work_on_files({path: files[path] for path in paths}, copied)
        for path, (_, came) in made.items():
            if came != expected_sha256(manifest, path):
                raise ArtifactError(f"{folder}: {hash_problem(path, came, expected_sha256(manifest, path))}")
        yield {path: copy for path, (copy, _) in made.items()}


def copy_file(source: int, target: int) -> str:
    """The sha256 of what was copied from one open file to the end of another."""
    digest, at = hashlib.sha256(), 0
    while block := os.pread(source, BLOCK_BYTES, at):
        digest.update(block)
        at += len(block)
        view = memoryview(block)
        while view:
            view = view[os.write(target, view) :]
    return digest.hexdigest()
