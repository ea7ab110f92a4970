"""The `.pt2` of a component: compiled files of all its graphs in, one archive out, equal bytes for equal files.

Of what the compiler leaves, sources and flags are not kept: a loader would compile or run them. Libraries lose the wish for
a stack that code could run on, and what would keep them mapped for ever. `runtime/storage/unpack.py` reads the archive.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....runtime.native.elf import FLAG_EXECUTABLE, GNU_STACK, read_segments
from ...private_torch import archive_models
from .. import CodeFiles

PACKAGED_SUFFIXES = (".so", ".json", ".cubin")
DYNAMIC_SYMBOLS, SYMBOL_BYTES = 11, 24  # SHT_DYNSYM, and the size of one of its entries
WEAK, UNIQUE = 2, 10  # STB_WEAK, STB_GNU_UNIQUE
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_package(path: Path, models: Mapping[str, CodeFiles]) -> None:
    """One archive of all models, in torch's own layout, with fixed times and order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / path.name
        archive_models(raw, {model: write_files(Path(scratch) / model, files) for model, files in models.items()})
        with zipfile.ZipFile(raw) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
            members = {name: source.read(name) for name in sorted(source.namelist())}
            for name, data in members.items():
                is_id = name.endswith("/.data/serialization_id")
                target.writestr(zipfile.ZipInfo(name, ZIP_EPOCH), serialization_id(members) if is_id else data)


def write_files(folder: Path, files: CodeFiles) -> list[Any]:
    """The paths of the files, written."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in files]


def clear_executable_stack(library: bytes) -> bytes:
    """The ELF library with a PT_GNU_STACK segment that no longer asks for execution.

    torch 2.13 assembles the (empty) constants from text that does not say what stack it needs, and the linker takes that for
    a wish; glibc from 2.41 on refuses to load such a library. None of the code runs on its stack.
    """
    changed = bytearray(library)
    for segment in read_segments(library):
        if segment.kind == GNU_STACK:
            struct.pack_into("<I", changed, segment.flags_at, segment.flags & ~FLAG_EXECUTABLE)
    return bytes(changed)


def weaken_unique_symbols(library: bytes) -> bytes:
    """The ELF library with weak symbols in place of those that GCC makes unique (STB_GNU_UNIQUE) for templates' static data.

    A library with a unique symbol is never unmapped, whoever closes it, so a process that loads one artifact after the other
    would keep the code of all. Nothing here is shared with another library by such a symbol.
    """
    changed = bytearray(library)
    (sections,), (size, count) = struct.unpack_from("<Q", library, 40), struct.unpack_from("<HH", library, 58)
    for at in range(sections, sections + count * size, size):
        kind, start, length = struct.unpack_from("<4xI16xQQ", library, at)
        if kind == DYNAMIC_SYMBOLS:
            for symbol in range(start, start + length, SYMBOL_BYTES):
                binding, kind_of_symbol = divmod(library[symbol + 4], 16)
                if binding == UNIQUE:
                    changed[symbol + 4] = WEAK * 16 + kind_of_symbol
    return bytes(changed)


def serialization_id(members: dict[str, bytes]) -> bytes:
    """Forty digits for what is kept; torch's own covers the time."""
    kept = hashlib.sha256()
    for name, data in members.items():
        if not name.endswith("/.data/serialization_id"):
            kept.update(name.encode() + hashlib.sha256(data).digest())
    return f"{int(kept.hexdigest(), 16) % 10**40:040d}".encode()


def is_packaged(file: str) -> bool:
    """Shared objects, kernels and metadata. `*compile_flags.json` would let a loader run a shell command."""
    return file.endswith(PACKAGED_SUFFIXES) and not file.endswith("compile_flags.json")
