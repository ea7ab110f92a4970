"""Where Inductor and the C++ compiler work: a private folder of this user, what may be in its path, and what is kept in it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ....runtime.errors import ExportError, RecipeError, first_line
from ....runtime.storage.scratch import remove_path
from ...private_torch import keep_headers

HEADERS_KEPT = 4
"""Compiled headers, of 140 MB each: two for each set of flags."""
HEADER_AGE_S = 86400.0
"""What was made since then may be another export's, which has it in mind."""
UNQUOTED = re.compile(r"[\s'\"\\]")
"""What tells words apart in the one line as which Inductor writes a compiler's command."""
COMPILER_ERROR = re.compile(
    r"\berror: |\bError: |internal compiler error|No space left on device|cannot find -l|undefined reference|Killed"
)


def check_build_place() -> None:
    """Raises RecipeError where no compiler could work in TMPDIR: before a model is loaded, not after minutes."""
    place = tempfile.gettempdir()
    if UNQUOTED.search(place):
        raise RecipeError(
            f"TMPDIR {place!r}: Inductor cannot compile in a folder with a space, a quote or a backslash in its path; set "
            "TMPDIR to another folder"
        )


@contextlib.contextmanager
def build_folder(folder: Path | None = None) -> Iterator[Path]:
    """Inductor's working folder, held by one export at a time. Headers that it compiles are kept from export to export.

    Raises ExportError when the place is not a private folder of this user (it will hold code that is loaded), and RecipeError
    as `check_build_place`.
    """
    check_build_place()
    usual = Path(tempfile.gettempdir()) / f"prebake-inductor-{os.getuid()}"
    place = make_private(folder or usual)
    headers = make_private(usual) / "headers"
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prune_headers(headers)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
        try:
            with keep_headers(headers):
                yield place
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def make_private(folder: Path) -> Path:
    """The folder, which is there afterwards. Raises ExportError where others than this user could write to it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ExportError(
            f"{folder}: expected a folder that only this user can open, because compiled code passes through it; remove it or set TMPDIR"
        )
    return folder


@functools.cache  # once a process: Inductor remembers where those are that it has used
def prune_headers(folder: Path) -> None:
    """Removes compiled headers beyond `HEADERS_KEPT`, the oldest first, if none of today's exports can be using them."""
    made = sorted(folder.glob("*.gch"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in made[HEADERS_KEPT:]:
        if path.stat().st_mtime < time.time() - HEADER_AGE_S:
            remove_path(path)
            remove_path(path.with_suffix(""))


def describe_compile_error(error: BaseException) -> str:
    """The first line of what Inductor says, and the first in which the compiler itself says what is wrong."""
    said = first_line(error)
    own = next((line.strip() for line in str(error).splitlines()[1:] if COMPILER_ERROR.search(line)), "")
    return f"{type(error).__name__}: {said}" + (f": {own}" if own else "")
