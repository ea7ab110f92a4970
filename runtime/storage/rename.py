"""A finished folder takes its place in one step: under its name there is the whole artifact, the one before, or nothing."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

from ..bounds import MAX_MANIFEST_BYTES, parse_json
from .files import read_plain_file
from .scratch import abandoned_folders, remove_path, scratch_folder

ASIDE_SUFFIX = ".old"


def is_artifact(folder: Path) -> bool:
    """Whether there is a manifest of any version of prebake; other tools' manifest.json files are none."""
    return listed_paths(folder) is not None


def listed_paths(folder: Path) -> set[str] | None:
    """The files that the folder's manifest lists, None where there is no manifest of any version of prebake."""
    try:
        manifest = parse_json(read_plain_file(folder, "manifest.json", MAX_MANIFEST_BYTES + 1))
        if not {"schema_version", "graphs", "plans"} <= manifest.keys():
            return None
        return {str(entry["path"]) for entry in manifest["files"] if {"size", "sha256"} <= entry.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def replacement_problem(folder: Path) -> str:
    """Why the folder may not be replaced by an artifact: it is none itself, or more than one. Nothing for one, or an empty one."""
    if not folder.is_dir():
        return "this is a file"
    if not any(folder.iterdir()):
        return ""
    listed = listed_paths(folder)
    if listed is None:
        return "this has no manifest.json of one"
    free = {"manifest.json", "signature.json", *listed}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (path.is_symlink() or not path.is_dir()) and name.as_posix() not in free and name.parts[0] != "reports":
            return f"{name.as_posix()!r} in it is no file of one; move it away"
    return ""


def make_readable(folder: Path, earlier: Path | None = None) -> None:
    """Everyone may read it whom the umask lets, as with any file that is written; safetensors and mkdtemp let the owner alone.

    Where an `earlier` folder is replaced, its modes stay: what was private does not become readable.
    """
    mask = process_umask()
    kept = earlier.stat().st_mode & 0o777 if earlier else 0o777 & ~mask
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(kept)
        else:
            path.chmod(kept & 0o666 if earlier else 0o666 & ~mask)


def process_umask() -> int:
    """This process's umask. `os.umask` cannot be asked without being set, for all threads at once."""
    with suppress(OSError, StopIteration, ValueError), open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    return 0o022


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
