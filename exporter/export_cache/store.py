"""Store: what graphs were compiled into, kept in a folder by the fingerprint of what they were compiled from.

An entry is one file, written beside its place and renamed, so that a killed export leaves none that is half, and several
exports may use a folder at once. It begins with a hash of the rest: what is damaged is removed and compiled anew. Entries that
were used longest ago go where the folder outgrows its limit. It holds code that will be run: only this user may write there.
`compilation.py` asks it for every graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.storage.private_folder import default_cache_folder, is_private_folder
from ...runtime.storage.scratch import remove_abandoned, scratch_folder
from ..lower import CodeFiles

LIMIT_BYTES = 4 << 30
ENTRY_SUFFIX, PARTIAL_PREFIX = ".graph", ".partial-"


class DamagedEntryError(Exception):
    """Why an entry is not what was written."""


def default_store_folder() -> Path:
    """Beside what the runtime keeps for this user."""
    return default_cache_folder() / "compiled"


@dataclass(frozen=True)
class StoreEntry:
    """A file of the folder: its size, when it was used last (seconds since 1970), and what its writer said about it."""

    path: Path
    size: int
    used: float
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Store:
    """The folder, made when the first entry is kept."""

    folder: Path
    limit_bytes: int = LIMIT_BYTES

    def get(self, key: str) -> CodeFiles | None:
        """The files kept under the key, None without any. Raises Damaged, and OSError for what cannot be read."""
        path = self.path(key)
        if not path.is_file() or not is_private_folder(self.folder):
            return None
        said, files = unpack_entry(path.read_bytes())
        if said["key"] != key:
            raise DamagedEntryError("it was kept under another key")
        with suppress(OSError):
            os.utime(path)
        return files

    def put(self, key: str, files: CodeFiles, about: Mapping[str, Any]) -> None:
        """Keeps the files, and lets go of those that were used longest ago. Raises OSError where nothing can be kept."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private_folder(self.folder):
            raise PermissionError(f"{self.folder} can be written by other users")
        with scratch_folder(self.folder, PARTIAL_PREFIX) as folder:
            fresh = folder / "entry"
            fresh.write_bytes(pack_entry(key, files, about))
            os.replace(fresh, self.path(key))
        self.prune(self.limit_bytes)

    def remove(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}{ENTRY_SUFFIX}"

    def entries(self) -> list[StoreEntry]:
        """All of them, used last first. Those that another process removes meanwhile are left out."""
        return sorted(filter(None, map(read_entry, self.folder.glob(f"*{ENTRY_SUFFIX}"))), key=lambda e: -e.used)

    def prune(self, limit_bytes: int) -> list[StoreEntry]:
        """Removes what was used longest ago until no more than this is left, and what killed exports left; the entries that
        it removed."""
        remove_abandoned(self.folder, PARTIAL_PREFIX)
        total, removed = 0, []
        for found in self.entries():
            total += found.size
            if total > limit_bytes:
                found.path.unlink(missing_ok=True)
                removed.append(found)
        return removed


def pack_entry(key: str, files: CodeFiles, about: Mapping[str, Any]) -> bytes:
    """A line with a hash of the rest, a line of JSON, then the files, one after another."""
    head = {"key": key, "about": dict(about), "files": {name: len(data) for name, data in files.items()}}
    rest = b"".join([json.dumps(head).encode(), b"\n", *files.values()])
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def unpack_entry(data: bytes) -> tuple[dict[str, Any], CodeFiles]:
    """An entry's head and its files. Raises Damaged."""
    expected, _, rest = data.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != expected:
        raise DamagedEntryError("its hash is another one")
    line, _, content = rest.partition(b"\n")
    head, files, at = json.loads(line), {}, 0
    for name, size in head["files"].items():
        files[name] = content[at : at + size]
        at += size
    return head, files


def read_entry(path: Path) -> StoreEntry | None:
    """An entry read from its head alone: `about` is empty where it is damaged. None if the file is gone."""
    try:
        info = path.stat()
        with path.open("rb") as file:
            file.readline(100)
            line = file.readline(1 << 16)
    except FileNotFoundError:
        return None
    try:
        about = dict(json.loads(line)["about"])
    except (ValueError, KeyError, TypeError):
        about = {}
    return StoreEntry(path, info.st_size, info.st_mtime, about)
