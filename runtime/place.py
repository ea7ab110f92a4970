"""A finished folder takes its place in one step: under its name there is the whole artifact, the one before, or nothing."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from pathlib import Path


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


def replace(folder: Path, output: Path) -> None:
    """Renames `folder` to `output`. With an earlier artifact there it changes places, which leaves no moment without one;
    where the file system cannot do that, the earlier one is moved aside first and removed last."""
    if not output.exists():
        folder.rename(output)
        return
    if exchanged(folder, output):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent)) / "old"
    output.rename(aside)
    try:
        folder.rename(output)
    except OSError:
        aside.rename(output)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def exchanged(a: Path, b: Path) -> bool:
    """Whether two folders now have each other's name: renameat2 with RENAME_EXCHANGE, which Linux has and Python lacks."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
