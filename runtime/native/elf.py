"""What a shared library says of itself, read from its bytes: nothing of it is mapped or run.

Layouts are those of the ELF-64 specification and, for symbol versions, of the Linux Standard Base (core, 10.7).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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


class Segment(NamedTuple):
    """A program header: `offset` and `length` are bytes of the file, `flags_at` is where in it the flags are."""

    kind: int
    flags: int
    offset: int
    address: int
    length: int
    flags_at: int


def read_elf(data: bytes | mmap.mmap) -> Elf:
    """The library's own words. Raises ValueError for what is no whole 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it does not begin like a 64-bit little-endian ELF file")
    try:
        machine, segments = struct.unpack_from("<H", data, 18)[0], list(read_segments(data))
        if any(s.offset + s.length > len(data) for s in segments if s.kind == SEGMENT_LOAD):
            # a page behind the end of its file is a bus error for whoever touches it
            raise ValueError("its segments lead out of the file")
        entries = dict(_dynamic_entries(data, segments))
        names = _file_offset(segments, entries[STRTAB]) if STRTAB in entries else 0
        return Elf(
            MACHINES.get(machine, f"machine {machine}"),
            _read_string(data, names + entries[SONAME]) if SONAME in entries else None,
            # a library that does not say gets one
            any(s.flags & FLAG_EXECUTABLE for s in segments if s.kind == GNU_STACK)
            or not any(s.kind == GNU_STACK for s in segments),
            dict(_read_needed_versions(data, names, _file_offset(segments, entries[VERNEED])))
            if VERNEED in entries
            else {},
            tuple(_read_defined_versions(data, names, _file_offset(segments, entries[VERDEF])))
            if VERDEF in entries
            else (),
        )
    except (struct.error, UnicodeDecodeError, OverflowError) as e:
        raise ValueError(f"its tables lead out of the file ({e})") from e


def map_elf(path: Path) -> Elf:
    """The `Elf` of a file, of which only the pages that are looked at are read. Raises what `read_elf` raises, and OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return read_elf(data)


def read_segments(data: bytes | mmap.mmap) -> Iterator[Segment]:
    """The program headers of a 64-bit little-endian ELF file. Raises struct.error where they lead out of it."""
    (start,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    for at in (start + i * size for i in range(min(count, MAX_LENGTH))):
        kind, flags, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, at)
        yield Segment(kind, flags, offset, address, length, at + 4)


def _dynamic_entries(data: bytes | mmap.mmap, segments: list[Segment]) -> Iterator[tuple[int, int]]:
    for segment in segments:
        if segment.kind == SEGMENT_DYNAMIC:
            for i in range(min(segment.length // 16, MAX_LENGTH)):
                tag, value = struct.unpack_from("<QQ", data, segment.offset + i * 16)
                if tag == 0:
                    return
                yield tag, value


def _file_offset(segments: list[Segment], address: int) -> int:
    """Where in the file that address comes from."""
    for s in segments:
        if s.kind == SEGMENT_LOAD and s.address <= address < s.address + s.length:
            return address - s.address + s.offset
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
