"""Memory that ran out, told in a sentence, whichever library ran into it; and memory that is not needed any more."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ArtifactError

MEMORY_MESSAGES = ("Cannot allocate memory", "can't allocate memory", "can't start new thread", "bad_alloc")
"""Of the C library, torch, Python and C++."""


THREAD_ROOM_BYTES = 4 << 20
"""More than the libraries of a process have of variables for each thread."""


@contextmanager
def explain_memory(what: object) -> Iterator[None]:
    """Raises ArtifactError, naming `what`, in place of an error that comes of memory that ran out."""
    try:
        yield
    except Exception as e:
        if is_out_of_memory(e):
            raise ArtifactError(
                f"{what}: memory ran out while it was opened; raise the limit of this process (ulimit -v, or its container's), "
                "or free some"
            ) from e
        raise


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or its cause, is about memory."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if any(words in str(error) for words in MEMORY_MESSAGES):
            return True
        error = error.__cause__
    return False


def require_room(nbytes: int = THREAD_ROOM_BYTES) -> None:
    """Raises OSError (ENOMEM) unless so much address space can be had now. Asked before a thread comes into a library for the first
    time: glibc ends the process where it has no memory for the library's variables of that thread."""
    mmap.mmap(-1, nbytes).close()


def trim_heap() -> None:
    """Gives the system what the C library's allocator keeps of memory that was freed. glibc can; others keep less, or do so
    by themselves."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)
