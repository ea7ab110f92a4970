"""Folders that are made under a hidden name, and renamed when they are whole; and what killed processes have left of them.

Whoever makes one holds a lock on it. The kernel lets go of a lock with its process, however that ended, so a folder that can
be locked is one that nobody will finish. On a file system without such locks nothing is taken for abandoned.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SCRATCH_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def scratch_folder(parent: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A fresh folder in `parent` that this user alone can open. What has its name at the end is removed. Raises OSError."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        try:
            descriptor = os.open(folder, SCRATCH_FLAGS)
        except FileNotFoundError:  # swept before it could be locked
            continue
        with suppress(OSError):  # without locks; then nobody sweeps
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.is_dir():
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        remove_path(folder)
        os.close(descriptor)


def abandoned_folders(parent: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """The folders of `scratch_folder` whose process is gone, each held until the next is asked for."""
    for folder in sorted(parent.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}")):
        try:
            descriptor = os.open(folder, SCRATCH_FLAGS)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
        except OSError:  # held, or no locks here
            continue
        finally:
            os.close(descriptor)


def remove_abandoned(parent: Path, prefix: str, suffix: str = "") -> None:
    """Removes the folders of `scratch_folder` whose process is gone."""
    for folder in abandoned_folders(parent, prefix, suffix):
        remove_path(folder)


def remove_path(path: Path) -> None:
    """Takes away a folder, file or link, if it is there and can be."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
