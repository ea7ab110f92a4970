"""Store: what graphs were compiled into, kept in a folder by the fingerprint of what they were compiled from.

An entry is one file, written beside its place and renamed, so that a killed export leaves none that is half, and several
exports may use a folder at once. It begins with a hash of the rest: what is damaged is removed and compiled anew. Entries that
were used longest ago go where the folder outgrows its limit. It holds code that will be run: only this user may write there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.unpack import default_cache, is_private
from .capture import Captured
from .fingerprint import fingerprint, toolchain
from .lower import Files
from .progress import Progress
from .recipe import Recipe

LIMIT_BYTES = 4 << 30
SUFFIX, PARTIAL = ".graph", ".partial"
COMPILED, FROM_CACHE = "compiled", "from the cache"
ABANDONED = 3600  # seconds after which nobody is still writing a partial file


class Damaged(Exception):
    """Why an entry is not what was written."""


def default_folder() -> Path:
    """Beside what the runtime keeps for this user."""
    return default_cache() / "compiled"


@dataclass(frozen=True)
class Entry:
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

    def get(self, key: str) -> Files | None:
        """The files kept under the key, None without any. Raises Damaged, and OSError for what cannot be read."""
        path = self.path(key)
        if not path.is_file() or not is_private(self.folder):
            return None
        said, files = parsed(path.read_bytes())
        if said["key"] != key:
            raise Damaged("it was kept under another key")
        with suppress(OSError):
            os.utime(path)
        return files

    def put(self, key: str, files: Files, about: Mapping[str, Any]) -> None:
        """Keeps the files, and lets go of those that were used longest ago. Raises OSError where nothing can be kept."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(self.folder):
            raise PermissionError(f"{self.folder} can be written by other users")
        descriptor, partial = tempfile.mkstemp(suffix=PARTIAL, dir=self.folder)  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(written(key, files, about))
            os.replace(partial, self.path(key))
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        self.prune(self.limit_bytes)

    def remove(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def entries(self) -> list[Entry]:
        """All of them, used last first. Those that another process removes meanwhile are left out."""
        return sorted(filter(None, map(entry, self.folder.glob(f"*{SUFFIX}"))), key=lambda e: -e.used)

    def prune(self, limit_bytes: int) -> list[Entry]:
        """Removes what was used longest ago until no more than this is left, and what killed exports left; the entries that
        it removed."""
        for partial in self.folder.glob(f"*{PARTIAL}"):
            with suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime > ABANDONED:
                    partial.unlink()
        total, removed = 0, []
        for found in self.entries():
            total += found.size
            if total > limit_bytes:
                found.path.unlink(missing_ok=True)
                removed.append(found)
        return removed


def written(key: str, files: Files, about: Mapping[str, Any]) -> bytes:
    """A line with a hash of the rest, a line of JSON, then the files, one after another."""
    head = {"key": key, "about": dict(about), "files": {name: len(data) for name, data in files.items()}}
    rest = b"".join([json.dumps(head).encode(), b"\n", *files.values()])
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def parsed(data: bytes) -> tuple[dict[str, Any], Files]:
    """An entry's head and its files. Raises Damaged."""
    expected, _, rest = data.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != expected:
        raise Damaged("its hash is another one")
    line, _, content = rest.partition(b"\n")
    head, files, at = json.loads(line), {}, 0
    for name, size in head["files"].items():
        files[name] = content[at : at + size]
        at += size
    return head, files


def entry(path: Path) -> Entry | None:
    """What can be said of a file without reading all of it: `about` is empty where it is damaged. None if it is gone."""
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
    return Entry(path, info.st_size, info.st_mtime, about)


# --- while graphs are lowered ---------------------------------------------------------------------------------------


@dataclass
class Making:
    """What a backend asks for each graph's files (`lower.Made`): from the store, where there is one, else compiled.

    Which it was is told to `progress`. Whatever is wrong with a store costs the time of compiling and a note, and never an
    export.
    """

    progress: Progress
    store: Store | None = None
    tools: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, model: str, store: Store | None, progress: Progress) -> Making:
        """For the graphs of a recipe. `model` is told by `prebake cache`, and is no part of a fingerprint."""
        if store is None:
            return cls(progress)
        return cls(progress, store, toolchain(recipe), {"model": model, "backend": recipe.compile.backend})

    def __call__(self, component: str, graph: Captured, compiled: Callable[[Captured], Files]) -> Files:
        title = f"{component}: {graph.name}" if component != graph.name else component
        key = fingerprint(graph, self.tools, self.digests) if self.store else None
        if key and (files := self.kept(key)):
            self.progress.doing(f"{title}, {FROM_CACHE}")
            self.progress.graphs[graph.name] = FROM_CACHE
            return files
        self.progress.doing(title)
        begun = time.perf_counter()
        files = compiled(graph)
        self.progress.graphs[graph.name] = COMPILED
        if key:
            self.keep(key, files, {**self.about, "graph": graph.name, "seconds": round(time.perf_counter() - begun, 2)})
        return files

    def kept(self, key: str) -> Files | None:
        assert self.store
        try:
            return self.store.get(key)
        except (Damaged, OSError) as e:
            self.progress.note(f"{self.store.path(key)}: cannot be used ({e}), so the graph is compiled anew")
            with suppress(OSError):
                self.store.remove(key)
        return None

    def keep(self, key: str, files: Files, about: Mapping[str, Any]) -> None:
        assert self.store
        try:
            self.store.put(key, files, about)
        except OSError as e:
            self.progress.note(f"{self.store.folder}: nothing can be kept there ({e}); the next export compiles again")
            self.store = None

    def summary(self) -> str:
        """Which graphs were compiled, and which were not."""
        origins = self.progress.graphs
        groups = {origin: [n for n in origins if origins[n] == origin] for origin in (COMPILED, FROM_CACHE)}
        return "; ".join(f"{origin}: {', '.join(names)}" for origin, names in groups.items() if names)
