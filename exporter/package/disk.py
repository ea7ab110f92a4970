"""A disk that is full or cannot be written, told in a sentence, whichever library ran into it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...runtime.errors import ExportError

DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def explain_disk_errors(output: Path) -> Iterator[None]:
    """Raises ExportError in place of an error that comes of a disk with no room, or of one that cannot be written."""
    try:
        yield
    except Exception as e:
        if reason := find_disk_problem(e):
            where = find_full_place(e, output)
            way_out = "choose another TMPDIR" if is_in_tmpdir(where, output) else "choose another --output or TMPDIR"
            raise ExportError(
                f"{output}: cannot be written, since {where} says {reason!r}; make room, or {way_out}"
            ) from e
        raise


def find_full_place(error: BaseException, output: Path) -> Path:
    """The file that the error names, or one in TMPDIR that a compiler names; else the one of TMPDIR and the output's folder
    that has less room."""
    temporary, named = Path(tempfile.gettempdir()), error
    while named is not None:
        if isinstance(filename := getattr(named, "filename", None), str | os.PathLike):
            return Path(filename)
        found = re.search(rf"{re.escape(str(temporary))}/[^\s'\":]*", str(named))
        if found and not found[0].startswith(f"{output.parent}/"):
            return Path(found[0])
        named = named.__cause__
    return min((output.parent, temporary), key=free_bytes)


def is_in_tmpdir(place: Path, output: Path) -> bool:
    """Whether the place is one for temporary files, and the output is elsewhere."""
    temporary = Path(tempfile.gettempdir())
    return place.is_relative_to(temporary) and not output.is_relative_to(temporary)


def free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def find_disk_problem(error: BaseException | None) -> str | None:
    """What the system said, where the error or its cause is about a disk: as an OSError, in Rust's words, or a compiler's."""
    while error is not None:
        said = [int(number) for number in re.findall(r"os error (\d+)", str(error))]
        for code in (getattr(error, "errno", None), *said):
            if code in DISK_ERRNOS:
                return os.strerror(code)
        if os.strerror(errno.ENOSPC) in str(error):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__
    return None
