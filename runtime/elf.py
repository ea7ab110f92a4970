"""What a shared library says of itself, read from its bytes: nothing of it is mapped or run.

Layouts are those of the ELF-64 specification and, for symbol versions, of the Linux Standard Base (core, 10.7).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine -> platform.machine()
SEGMENT_LOAD, SEGMENT_DYNAMIC, GNU_STACK = 1, 2, 0x6474E551
STRTAB, SONAME, VERDEF, VERNEED = 5, 14, 0x6FFFFFFC, 0x6FFFFFFE
FLAG_EXECUTABLE = 1
MAX_LENGTH = 4096  # of any list here, and of any name: more is no library that a linker wrote


@dataclass(frozen=True)
class Elf:
    """`needs` are versions by the library that has to have them (`GLIBC_2.34` of `libc.so.6`), `gives` its own versions."""

    machine: str
    soname: str | None
    executable_stack: bool
    needs: dict[str, tuple[str, ...]]
    gives: tuple[str, ...]


def read_elf(data: bytes | mmap.mmap) -> Elf:
    """The library's own words. Raises ValueError for what is no whole 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it does not begin like a 64-bit little-endian ELF file")
    try:
        machine, headers = struct.unpack_from("<H", data, 18)[0], list(_segment_headers(data))
        if any(offset + length > len(data) for kind, _, offset, _, length in headers if kind == SEGMENT_LOAD):
            # a page behind the end of its file is a bus error for whoever touches it
            raise ValueError("its segments lead out of the file")
        entries = dict(_dynamic_entries(data, headers))
        names = _file_offset(headers, entries[STRTAB]) if STRTAB in entries else 0
        return Elf(
            MACHINES.get(machine, f"machine {machine}"),
            _read_string(data, names + entries[SONAME]) if SONAME in entries else None,
            # a library that does not say gets one
            any(flags & FLAG_EXECUTABLE for kind, flags, *_ in headers if kind == GNU_STACK)
            or not any(kind == GNU_STACK for kind, *_ in headers),
            dict(_read_needed_versions(data, names, _file_offset(headers, entries[VERNEED])))
            if VERNEED in entries
            else {},
            tuple(_read_defined_versions(data, names, _file_offset(headers, entries[VERDEF])))
            if VERDEF in entries
            else (),
        )
    except (struct.error, UnicodeDecodeError, OverflowError) as e:
        raise ValueError(f"its tables lead out of the file ({e})") from e


def map_elf(path: Path) -> Elf:
    """The `Elf` of a file, of which only the pages that are looked at are read. Raises what `read_elf` raises, and OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return read_elf(data)


def _segment_headers(data: bytes | mmap.mmap) -> Iterator[tuple[int, int, int, int, int]]:
    """(kind, flags, offset, address, size in the file) of each segment."""
    (start,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    for i in range(min(count, MAX_LENGTH)):
        kind, flags, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, start + i * size)
        yield kind, flags, offset, address, length


def _dynamic_entries(
    data: bytes | mmap.mmap, headers: list[tuple[int, int, int, int, int]]
) -> Iterator[tuple[int, int]]:
    for kind, _, offset, _, length in headers:
        if kind == SEGMENT_DYNAMIC:
            for i in range(min(length // 16, MAX_LENGTH)):
                tag, value = struct.unpack_from("<QQ", data, offset + i * 16)
                if tag == 0:
                    return
                yield tag, value


def _file_offset(headers: list[tuple[int, int, int, int, int]], address: int) -> int:
    """Where in the file that address comes from."""
    for kind, _, offset, start, length in headers:
        if kind == SEGMENT_LOAD and start <= address < start + length:
            return address - start + offset
    raise ValueError("it has an address that is in none of its segments")


def _read_needed_versions(data: bytes | mmap.mmap, names: int, start: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    for at in _chain_offsets(data, start, 12):
        _, _, file, first = struct.unpack_from("<HHII", data, at)
        versions = (struct.unpack_from("<I", data, aux + 8)[0] for aux in _chain_offsets(data, at + first, 12))
        yield _read_string(data, names + file), tuple(sorted(_read_string(data, names + name) for name in versions))


def _read_defined_versions(data: bytes | mmap.mmap, names: int, start: int) -> Iterator[str]:
    for at in _chain_offsets(data, start, 16):
        (first,) = struct.unpack_from("<I", data, at + 12)
        yield _read_string(data, names + struct.unpack_from("<I", data, at + first)[0])


def _chain_offsets(data: bytes | mmap.mmap, at: int, step: int) -> Iterator[int]:
    """The places of a list whose entries say, `step` bytes behind their start, how far away the next one is."""
    for _ in range(MAX_LENGTH):
        yield at
        (ahead,) = struct.unpack_from("<I", data, at + step)
        if not ahead:
            return
        at += ahead


def _read_string(data: bytes | mmap.mmap, at: int) -> str:
    end = data.find(b"\0", at, at + MAX_LENGTH)
    if end < 0:
        raise ValueError("it has a name without an end")
    return data[at:end].decode()
