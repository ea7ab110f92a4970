"""The CPU instruction set that compiled code may use, chosen at export and written down, never `-march=native` unsaid."""

from __future__ import annotations

import platform
from pathlib import Path

from ....runtime.errors import ExportError
from ...private_torch import has_inductor_flag

V3_FLAGS = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
V4_FLAGS = (*V3_FLAGS, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
ISA_LEVELS = {"x86-64-v3": V3_FLAGS, "x86-64-v4": V4_FLAGS}
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""By any of which a CPU multiplies bfloat16."""
SIMDLEN = {"x86-64-v3": 256, "x86-64-v4": 512}


def host_flags() -> frozenset[str]:
    """This machine's CPU flags as /proc/cpuinfo names them; empty where there is none (not Linux, not x86)."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def choose_isa(isa: str) -> tuple[str, tuple[str, ...]]:
    """(level, /proc/cpuinfo flags it needs). "host" is the highest named level that this machine has.

    Raises ExportError for a level that the compiler's self-checks could not run here.
    """
    flags = host_flags()
    if isa == "native" or platform.machine() not in ("x86_64", "AMD64"):
        return "native", tuple(sorted(flags))
    if isa == "host":
        level = next((name for name in ("x86-64-v4", "x86-64-v3") if flags.issuperset(ISA_LEVELS[name])), None)
        if level is None:
            raise ExportError(
                "compile.isa 'host': this CPU has no AVX2, so neither x86-64-v3 nor v4 fits; set compile.isa=native"
            )
        return level, ISA_LEVELS[level]
    missing = sorted(set(ISA_LEVELS[isa]) - flags)
    if missing:
        raise ExportError(
            f"compile.isa {isa!r} needs {', '.join(missing)}, which this CPU lacks, so the result could not be verified here; export on such a machine or choose a lower level"
        )
    return isa, ISA_LEVELS[isa]


def multiplies_bfloat16(level: str) -> bool:
    """Whether this CPU has instructions for bfloat16, and code for the level may meet others like it: CPUs of x86-64-v3 have
    none. Of another processor family nothing is known, and yes is said."""
    flags = host_flags()
    return not flags or (level != "x86-64-v3" and not BFLOAT16_FLAGS.isdisjoint(flags))


def int8_flags() -> tuple[str, ...]:
    """The flag that quantized code needs besides its level.

    Where the exporting CPU has VNNI, torchao multiplies unsigned by signed bytes. Without VNNI oneDNN adds such products
    in pairs of 16 bits, which saturate: the test pipeline's error rose from 0.001 to 0.02 with oneDNN held below VNNI.
    """
    return next(((flag,) for flag in ("avx512_vnni", "avx_vnni") if flag in host_flags()), ())


def inductor_flags(level: str) -> dict[str, object]:
    """The Inductor options that hold generated code to the level. `cpp.march` exists since torch 2.13."""
    if level == "native":
        return {}
    flags: dict[str, object] = {"cpp.simdlen": SIMDLEN[level]}
    if has_inductor_flag("cpp.march"):
        flags["cpp.march"] = level
    return flags
