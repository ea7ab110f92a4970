"""Which versions made an artifact, for its manifest."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from ..private_torch import cpp_compiler

TOOLCHAIN_PACKAGES = ("prebake", "torch", "diffusers", "transformers", "torchao", "tokenizers", "safetensors")


def toolchain_versions() -> dict[str, str]:
    """Package -> version, with Python and the C++ compiler; only what is installed."""
    found = {"python": platform.python_version(), "g++": compiler_version()}
    for name in TOOLCHAIN_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def compiler_version() -> str:
    """What the C++ compiler that Inductor calls says of itself, `unknown` if there is none."""
    try:
        done = subprocess.run([cpp_compiler(), "-dumpfullversion"], capture_output=True, text=True, check=True)
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def glibc_version() -> str | None:
    """`major.minor` of the C library here, None on another one than glibc."""
    name, number = platform.libc_ver()
    return number if name == "glibc" else None
