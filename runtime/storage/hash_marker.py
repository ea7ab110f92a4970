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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .user_cache import read_private, write_private

if TYPE_CHECKING:
    from ..manifest import Manifest

MARKER_FOLDER = "verified"
RECENT_NS = 2_000_000_000  # clocks of file systems tick up to this slowly, so a later change might show the same time
MAX_MARKER_BYTES = 1 << 20  # bytes of a marker


class HashMarker:
    """The marker of these open files, whose states are taken now, before anything is hashed."""

    def __init__(self, cache: Path, folder: Path, manifest: Manifest, files: Mapping[str, int]):
        self._files, self._cache = files, cache
        info = folder.stat()
        # one for each folder, so they stay few
        self._path = f"{MARKER_FOLDER}/{info.st_dev:x}-{info.st_ino:x}.json"
        content = manifest.to_json().encode("utf-8", "surrogatepass")
        self._said: dict[str, Any] = {"manifest": hashlib.sha256(content).hexdigest(), "files": file_states(files)}

    def is_valid(self) -> bool:
        """Whether exactly these files, in this state, were found right before."""
        try:
            return json.loads(read_private(self._cache, self._path, MAX_MARKER_BYTES)) == self._said
        except (ValueError, RecursionError):
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
        write_private(self._cache, self._path, json.dumps(self._said).encode("ascii"))


def file_states(files: Mapping[str, int]) -> dict[str, list[int]]:
    """Path -> [device, inode, size, mtime, ctime] of the open file."""
    infos = {path: os.fstat(descriptor) for path, descriptor in files.items()}
    return {p: [i.st_dev, i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns] for p, i in infos.items()}
