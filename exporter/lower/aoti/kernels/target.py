"""Which instructions the CPU kernels are compiled for: a level, and what the exporting CPU has besides."""

from __future__ import annotations

from dataclasses import dataclass

from .. import isa as instructions

EXTENSIONS = {"x86-64-v3": ("avx_vnni",), "x86-64-v4": ("avx512_bf16", "avx512_vnni")}
"""What the kernels use above a level where the CPU has it, as /proc/cpuinfo names it. Without VNNI products of bytes take words,
and without BF16 those of bfloat16 take float32: see `kernels/product.h`."""


@dataclass(frozen=True)
class KernelTarget:
    """One of the levels, and some of its `EXTENSIONS`."""

    level: str
    extensions: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """What a machine must have, as /proc/cpuinfo names it."""
        return (*instructions.ISA_LEVELS[self.level], *self.extensions)

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the compiler is told."""
        return (f"-march={self.level}", *(f"-m{name.replace('_', '')}" for name in self.extensions))


def choose_target(isa: str, *, extended: bool = True) -> KernelTarget | None:
    """What kernels are compiled for beside code for this `compile.isa`, `extended` or the level alone; None where this machine
    could not verify them, for it has no level that they are written for. Raises ExportError as `choose_isa`."""
    level, _ = instructions.choose_isa(isa)
    levels = (level,) if level in EXTENSIONS else sorted(EXTENSIONS, reverse=True)
    flags = instructions.host_flags()
    best = next((name for name in levels if flags.issuperset(instructions.ISA_LEVELS[name])), None)
    if best is None:
        return None
    return KernelTarget(best, tuple(name for name in EXTENSIONS[best] if extended and name in flags))
