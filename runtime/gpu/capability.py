"""What code that was compiled for GPUs asks of this one: its compute capability, and the CUDA of its driver.

A manifest's `requires.packages` come in, as `exporter/lower/aoti/cuda.py` and `exporter/lower/tensorrt/__init__.py` write them; sentences
come out. Nothing is opened.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping

CUDA_KEY = "cuda"
DRIVER_LIBRARY = "libcuda.so.1"
CAPABILITY_KEY = "compute_capability"


def driver_problems(packages: Mapping[str, str], cuda: int) -> Iterator[str]:
    """What a driver for CUDA `cuda` lacks."""
    needed = packages.get(CUDA_KEY, "0")
    if not needed.isdigit():
        yield f"manifest.json [requires.packages.{CUDA_KEY}]: expected a number, got {needed!r}; export again"
    elif cuda < int(needed):
        yield f"needs a driver for CUDA {needed}, this one is for CUDA {cuda}; update the NVIDIA driver"


def capability_problems(packages: Mapping[str, str], capability: tuple[int, int]) -> Iterator[str]:
    """Whether code for "sm90", or for "sm90+", which newer GPUs can compile for themselves, runs on a GPU of that kind."""
    asked = packages.get(CAPABILITY_KEY, "none")
    match = re.fullmatch(r"sm(\d+)(\d)(\+?)", asked)
    if match is None:
        yield f"manifest.json [requires.packages.{CAPABILITY_KEY}]: expected one such as sm90, got {asked!r}; export again"
        return
    made_for = int(match[1]), int(match[2])
    if not (capability >= made_for if match[3] else capability == made_for):
        yield (
            f"was compiled for GPUs of compute capability {asked}, this one has {capability_name(capability)}; "
            "export again on a machine with this GPU"
        )


def capability_name(capability: tuple[int, int]) -> str:
    """(9, 0) as "sm90"."""
    return "sm{}{}".format(*capability)


def cuda_of_driver() -> int:
    """The CUDA release, such as 13, that the driver supports, by its own word: torch (2.11) does not pass it on."""
    version = ctypes.c_int()
    ctypes.CDLL(DRIVER_LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000
