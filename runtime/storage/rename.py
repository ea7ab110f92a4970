"""A finished folder takes its place in one step: under its name there is the whole artifact, the one before, or nothing."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from pathlib import Path

from .scratch import abandoned_folders, remove_path, scratch_folder

ASIDE_SUFFIX = ".old"


def is_artifact(folder: Path) -> bool:
    """Whether there is a manifest of any version of prebake; other tools' manifest.json files are none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "schema_version" in manifest


def make_readable(folder: Path) -> None:
    """Everyone may read it, as with any file that is written; safetensors and mkdtemp let the owner alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def rename_if_free(folder: Path, output: Path) -> bool:
    """Whether `folder` has got that name, which nothing had, or an empty folder."""
    try:
        folder.rename(output)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def replace_folder(folder: Path, output: Path) -> None:
    """Renames `folder` to `output`. With an earlier artifact there it changes places, which leaves no moment without one;
    where the file system cannot do that, the earlier one is moved aside first and removed last, see `recover_artifact`."""
    if rename_if_free(folder, output) or exchange_folders(folder, output):
        return
    with scratch_folder(output.parent, f".{output.name}.", ASIDE_SUFFIX) as aside:
        output.rename(aside / "old")
        try:
            folder.rename(output)
        except OSError:
            (aside / "old").rename(output)
            raise


def recover_artifact(output: Path) -> None:
    """Puts an earlier artifact back that a process had moved aside when it was killed."""
    for aside in abandoned_folders(output.parent, f".{output.name}.", ASIDE_SUFFIX):
        if not output.exists() and (aside / "old").exists():
            (aside / "old").rename(output)
        remove_path(aside)


def exchange_folders(a: Path, b: Path) -> bool:
    """Whether two folders now have each other's name: renameat2 with RENAME_EXCHANGE, which Linux has and Python lacks."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
