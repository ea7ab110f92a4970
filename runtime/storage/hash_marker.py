"""What was hashed once need not be hashed again: a marker in the user's private cache folder says which files were found right.

Open files and a manifest come in. A marker binds the manifest's hash and, for each file, device, inode, size, and the times
of the last change of content (mtime) and of anything (ctime), in nanoseconds. It holds as long as all of them are equal.
No program can set a ctime, so a file that anyone has written to, replaced, restored or linked since is hashed again.

What a marker cannot promise: that the disk still gives back what was written (it may rot, or be written to beneath the
file system), or that a file system over a network tells of changes elsewhere; and nothing against this machine's
administrator, who sets clocks, against this user, who may write markers, or against a program that has mapped a file for
writing since before it was hashed. Where that matters, give a `cache_dir` of your own that is empty, and all is hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..manifest import Manifest
from .private_folder import is_private_folder
from .scratch import remove_abandoned, scratch_folder

MARKER_FOLDER = "verified"
SCRATCH_PREFIX = ".fresh."  # of what is not yet a marker
RECENT_NS = (
    2_000_000_000  # ns: clocks of file systems tick up to this slowly, so a later change might show the same time
)
MAX_MARKER_BYTES = 1 << 20  # bytes of a marker


class HashMarker:
    """The marker of these open files, whose states are taken now, before anything is hashed."""

    def __init__(self, cache: Path, folder: Path, manifest: Manifest, files: Mapping[str, int]):
        self._files, self._cache = files, cache
        info = folder.stat()
        self._path = (
            cache / MARKER_FOLDER / f"{info.st_dev:x}-{info.st_ino:x}.json"
        )  # one for each folder, so they stay few
        content = manifest.to_json().encode("utf-8", "surrogatepass")
        self._said: dict[str, Any] = {"manifest": hashlib.sha256(content).hexdigest(), "files": file_states(files)}

    def is_valid(self) -> bool:
        """Whether exactly these files, in this state, were found right before."""
        try:
            return self._is_ours() and json.loads(self._read()) == self._said
        except (OSError, ValueError, RecursionError):
            return False

    def write(self) -> None:
        """Says so from now on, unless a file has changed since this object was made, or just before.

        Where nothing private can be written, nothing is: the next load hashes again.
        """
        since = time.time_ns() - RECENT_NS
        if file_states(self._files) != self._said["files"] or any(
            max(s[3:]) > since for s in self._said["files"].values()
        ):
            return
        with suppress(OSError):
            for folder in (self._cache, self._path.parent):  # the mode is not for parents
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_ours():
                remove_abandoned(self._path.parent, SCRATCH_PREFIX)
                with scratch_folder(self._path.parent, SCRATCH_PREFIX) as fresh:  # mode 0700
                    (fresh / "marker").touch(mode=0o600)
                    (fresh / "marker").write_text(json.dumps(self._said), "ascii")
                    (fresh / "marker").replace(self._path)

    def _is_ours(self) -> bool:
        return is_private_folder(self._cache) and is_private_folder(self._path.parent)

    def _read(self) -> bytes:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise PermissionError(f"{self._path} can be written by other users")
            return file.read(MAX_MARKER_BYTES)


def file_states(files: Mapping[str, int]) -> dict[str, list[int]]:
    """Path -> [device, inode, size, mtime, ctime] of the open file."""
    infos = {path: os.fstat(descriptor) for path, descriptor in files.items()}
    return {p: [i.st_dev, i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns] for p, i in infos.items()}
