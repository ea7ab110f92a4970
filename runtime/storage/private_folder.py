"""The cache folder of this user, and whether a folder is private."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def default_cache_folder() -> Path:
    """This user's cache folder. Where nobody says where their home is, a folder of that user's number among the temporary ones."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prebake"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"prebake-{os.geteuid()}"


def is_private_folder(folder: Path) -> bool:
    """Whether nobody but this user can change what is in the folder."""
    info = folder.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022
