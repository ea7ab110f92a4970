"""What the C library's allocator has given out."""

import ctypes

import pytest


class Mallinfo2(ctypes.Structure):
    """glibc's account of its heap, exact where the pages that are resident depend on what else the machine does."""

    FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in FIELDS)


def heap_bytes() -> int:
    """What malloc has given out in this process: of its arenas, and mapped one by one."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("mallinfo2 came with glibc 2.33")
    mallinfo2.restype = Mallinfo2
    told = mallinfo2()
    return told.uordblks + told.hblkhd
