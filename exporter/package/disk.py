"""A disk that is full or cannot be written, told in a sentence, whichever library ran into it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
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
            where = getattr(e, "filename", None) or output.parent
            raise ExportError(
                f"{output}: cannot be written, since {where} says {reason!r}; make room, or choose another --output or TMPDIR"
            ) from e
        raise


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
