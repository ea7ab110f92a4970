"""Whether compiled libraries can be loaded here."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from .elf import map_elf, read_elf

EXECUTABLE_STACK_GLIBC = (2, 41)  # from this glibc on, dlopen refuses a library that asks for an executable stack


def library_problems(name: str, data: bytes) -> Iterator[str]:
    """Why the dynamic linker would refuse the library, `name` for messages, or should not be asked.

    Versions are compared with the libraries that this process has loaded: torch brings in those that compiled code needs.
    """
    try:
        elf = read_elf(data)
    except ValueError as e:
        yield f"{name}: expected a shared library, but {e}; restore the file or export again"
        return
    if elf.machine != platform.machine():
        yield f"{name}: is code for {elf.machine}, this machine is {platform.machine()}; export again on this machine"
        return
    libc, version = platform.libc_ver()
    if elf.executable_stack and libc == "glibc" and version_numbers(version) >= EXECUTABLE_STACK_GLIBC:
        yield f"{name}: asks for an executable stack, which glibc {version} refuses; export again"
    for library, wanted in elf.needs.items():
        given = symbol_versions(library)
        if given and (lacking := sorted(set(wanted) - given, key=_version_order)):
            highest = max(
                (v for v in given if _version_prefix(v) == _version_prefix(lacking[-1])),
                key=_version_order,
                default="none",
            )
            yield (
                f"{name}: needs {lacking[-1]} of {library}, the one here has {highest} at most; "
                "export again on this machine, or on one as old"
            )


@functools.cache
def symbol_versions(library: str) -> frozenset[str]:
    """The symbol versions of a library that this process has loaded, by its soname; none where it has not, or cannot tell."""
    for path in loaded_libraries():
        if path.name.startswith(library.split(".so")[0]):
            try:
                elf = map_elf(path)
            except (OSError, ValueError):
                continue
            if elf.soname == library:
                return frozenset(elf.gives)
    return frozenset()


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> list[Path]:
    """The files of code that this process has mapped, in the order of their addresses."""
    try:
        lines = [line.split(maxsplit=5) for line in os.fsdecode(maps.read_bytes()).splitlines()]
    except OSError:
        return []
    return [Path(p) for p in dict.fromkeys(f[5] for f in lines if len(f) == 6 and ".so" in f[5] and f[5][0] == "/")]


def _version_prefix(version: str) -> str:
    return version.rpartition("_")[0]


def _version_order(version: str) -> tuple[str, tuple[int, ...]]:
    return _version_prefix(version), version_numbers(version.rpartition("_")[2])


def version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
