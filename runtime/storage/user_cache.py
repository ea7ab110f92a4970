"""What one process leaves in the user's cache folder for later ones: files that nobody else can write, each whole or absent.

A path in a folder of the cache comes in. What is not private is not read; what cannot be kept privately is not kept.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .private_folder import default_cache_folder, is_private_folder
from .scratch import remove_abandoned, scratch_folder

SCRATCH_PREFIX = ".fresh."  # of what is not yet whole


def write_private(cache: Path | None, path: str, data: bytes) -> None:
    """Puts `data` at `<cache>/<folder>/<name>`, by one rename; `cache` is None for the usual place."""
    where = (cache or default_cache_folder()) / path
    with suppress(OSError):
        for folder in (where.parent.parent, where.parent):  # the mode is not for parents
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private_path(where):
            remove_abandoned(where.parent, SCRATCH_PREFIX)
            with scratch_folder(where.parent, SCRATCH_PREFIX) as fresh:  # mode 0700
                (fresh / "file").touch(mode=0o600)
                (fresh / "file").write_bytes(data)
                (fresh / "file").replace(where)


def read_private(cache: Path | None, path: str, limit_bytes: int = -1) -> bytes:
    """What was put there, no more than the first `limit_bytes`, or nothing: where there is no such file, or where others could
    have written it."""
    where = (cache or default_cache_folder()) / path
    try:
        if not _is_private_path(where):
            return b""
        descriptor = os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            return file.read(limit_bytes) if info.st_uid == os.geteuid() and not info.st_mode & 0o022 else b""
    except OSError:
        return b""


def _is_private_path(where: Path) -> bool:
    return is_private_folder(where.parent.parent) and is_private_folder(where.parent)
