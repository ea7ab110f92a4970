"""Files that a recipe's `[model]` names beside the model itself: LoRAs and textual inversions, here, beside the model, or on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from ...runtime.errors import ExportError
from . import hub_errors as hub


def find_weight_file(key: str, path: str, weight_name: str | None, model: str, suffixes: Sequence[str]) -> Path:
    """The file at `path`, or beside the folder or file `model`; else of the repository of that name. `key` is the recipe's.

    Raises ExportError where there is none, and for a folder of several without `weight_name`.
    """
    given, folder = Path(path).expanduser(), Path(model).expanduser()
    places = [given, folder / path, folder.parent / path] if folder.exists() else [given]
    for place in places:
        if place.is_file():
            return place
        if place.is_dir():
            return choose_file(key, place, path, weight_name, suffixes)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.endswith(tuple(suffixes)):
        return choose_file(key, hub.download_files(key, path, suffixes), path, weight_name, suffixes)
    beside = f" or beside {model}" if len(places) > 1 else ""
    raise ExportError(
        f"{key} {path!r}: expected a {' or '.join(suffixes)} file or its folder, here{beside}, found none"
    )


def choose_file(key: str, folder: Path, path: str, weight_name: str | None, suffixes: Sequence[str]) -> Path:
    """The file in a folder that `weight_name` says, or its only one."""
    if weight_name is not None:
        if (folder / weight_name).is_file():
            return folder / weight_name
        raise ExportError(f"{key} {path!r}: has no file {weight_name!r}; set weight_name to one of its files")
    files = sorted(p for p in folder.iterdir() if p.suffix in suffixes)
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise ExportError(
            f"{key} {path!r}: expected one {' or '.join(suffixes)} file, found {names}; name it with weight_name"
        )
    return files[0]


def weight_file_name(path: str) -> str:
    """How the manifest names it: the hub's name, or the last part of a path."""
    return Path(path).name if Path(path).expanduser().exists() else path


def hash_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
