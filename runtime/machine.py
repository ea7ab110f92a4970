"""What an artifact's native code needs, and this machine, this torch or these system libraries do not have.

A manifest, or the bytes of a library, comes in; sentences come out. Nothing of the artifact is opened as code.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from .backends import backend
from .elf import map_elf, read_elf
from .errors import ArtifactError
from .manifest import Manifest

STACKS_REFUSED = (2, 41)  # from this glibc on, dlopen refuses a library that asks for an executable stack


def machine_problems(manifest: Manifest) -> Iterator[str]:
    """What the artifact's native code needs and this machine or this torch does not have."""
    import torch

    requires = manifest.requires
    here = (platform.system(), platform.machine())
    if here != (requires.system, requires.machine):
        yield f"was compiled for {requires.system} {requires.machine}, this machine is {here[0]} {here[1]}; export again on this machine"
    if missing := sorted(set(requires.isa) - cpu_flags()):
        yield (
            f"was compiled for {requires.isa_level}, this CPU lacks {', '.join(missing)}; "
            "export again on this machine, or with a lower compile.isa"
        )
    version = ".".join(torch.__version__.split(".")[:2])
    if requires.torch not in (None, version):
        yield (
            f"was compiled with torch {requires.torch}, this is torch {version}, and compiled code is not compatible "
            f"between the two; install torch {requires.torch}, or export again"
        )
    yield from glibc_problems(requires.glibc)
    if requires.device == "cuda" and not torch.cuda.is_available():
        yield "was compiled for cuda, this torch sees no GPU; use a CUDA build of torch, or export for the cpu"
    try:
        yield from backend(manifest.backend).problems(requires)
    except ArtifactError as e:
        yield str(e)


def glibc_problems(needed: str | None) -> Iterator[str]:
    name, version = platform.libc_ver()
    if needed is None or (name == "glibc" and _numbers(version) >= _numbers(needed)):
        return
    yield (
        f"needs glibc {needed}, this system has {name or 'another libc'} {version}".rstrip()
        + "; export again on this machine"
    )


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
    if elf.executable_stack and libc == "glibc" and _numbers(version) >= STACKS_REFUSED:
        yield f"{name}: asks for an executable stack, which glibc {version} refuses; export again"
    for library, wanted in elf.needs.items():
        given = versions_of(library)
        if given and (lacking := sorted(set(wanted) - given, key=_version_order)):
            highest = max((v for v in given if _prefix(v) == _prefix(lacking[-1])), key=_version_order, default="none")
            yield (
                f"{name}: needs {lacking[-1]} of {library}, the one here has {highest} at most; "
                "export again on this machine, or on one as old"
            )


@functools.cache
def versions_of(library: str) -> frozenset[str]:
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


def _prefix(version: str) -> str:
    return version.rpartition("_")[0]


def _version_order(version: str) -> tuple[str, tuple[int, ...]]:
    return _prefix(version), _numbers(version.rpartition("_")[2])


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The instruction sets of this CPU as Linux names them: `flags` on x86, `Features` on Arm. Empty elsewhere."""
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
