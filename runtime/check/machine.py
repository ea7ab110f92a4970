"""What an artifact's native code needs, and this machine, this torch or these system libraries do not have.

A manifest, or the bytes of a library, comes in; sentences come out. Nothing of the artifact is opened as code.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

from ..backends import backend_module
from ..errors import ArtifactError
from ..manifest import Manifest
from ..native.libraries import version_numbers


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
        yield from backend_module(manifest.backend).problems(requires)
    except ArtifactError as e:
        yield str(e)


def glibc_problems(needed: str | None) -> Iterator[str]:
    name, version = platform.libc_ver()
    if needed is None or (name == "glibc" and version_numbers(version) >= version_numbers(needed)):
        return
    yield (
        f"needs glibc {needed}, this system has {name or 'another libc'} {version}".rstrip()
        + "; export again on this machine"
    )


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The instruction sets of this CPU as Linux names them: `flags` on x86, `Features` on Arm. Empty elsewhere."""
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def cpu_name() -> str:
    """The CPU's name as Linux gives it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
