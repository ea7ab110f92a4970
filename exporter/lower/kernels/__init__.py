"""CPU kernels of our own, for what AOTInductor leaves slow: attention, and int8 layers with what lies around their product.

They are C++ in this folder, compiled when an artifact is exported and linked into its code, so that a runtime needs nothing
for them: Inductor calls them by torch's C interface, as it calls its own. Written for AVX-512 with VNNI and BF16 (AMD from
Zen 4 on, Intel from Sapphire Rapids on); for other machines a graph stays as it is.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ....runtime.errors import ExportError
from ..isa import LEVELS, host_flags
from .operators import OPERATORS

HERE = Path(__file__).parent
SOURCES = ("attention.cpp", "w8a8.cpp")
LIBRARY = "prebake_kernels"
LEVEL = "x86-64-v4"
FLAGS = ("avx512_bf16", "avx512_vnni")
"""What the kernels need above LEVEL, as /proc/cpuinfo names it."""
COMPILE = (
    "-std=c++20 -O3 -march=x86-64-v4 -mavx512vnni -mavx512bf16 -fPIC -fvisibility=hidden -ffile-prefix-map={here}=prebake -c"
)

_TENSOR, _OPTIONAL = "AtenTensorHandle", "const AtenTensorHandle*"
DECLARATIONS = {
    "packed_w8a8": f"AOTITorchError aoti_torch_cpu_packed_w8a8({_OPTIONAL}, int64_t, {_TENSOR}, {_TENSOR}, {_OPTIONAL}, int64_t, {_TENSOR}*)",
    "attention": f"AOTITorchError aoti_torch_cpu_attention({_TENSOR}, {_TENSOR}, {_TENSOR}, double, {_TENSOR}*)",
}


def fit(level: str) -> bool:
    """Whether code for this level of compile.isa may call them, and this machine could verify it."""
    return level in (LEVEL, "native") and host_flags().issuperset((*LEVELS[LEVEL], *FLAGS))


def called(gm: fx.GraphModule) -> bool:
    return any(node.target in OPERATORS for node in gm.graph.nodes)


@contextmanager
def linked(folder: Path, graphs: Iterable[fx.GraphModule], threads: int) -> Iterator[dict[str, Any]]:
    """Inductor's options for graphs that call the kernels, which are compiled into `folder` first; none for others."""
    if not any(map(called, graphs)):
        yield {}
        return
    archive(folder, threads)
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield {
            "aot_inductor.custom_ops_to_c_shims": {
                op: [DECLARATIONS[op._schema.name.partition("::")[2]]] for op in OPERATORS
            },
            "aot_inductor.custom_op_libs": [LIBRARY],
        }
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before


def archive(folder: Path, threads: int) -> Path:
    """A static library of the kernels for loops of so many threads. Raises ExportError with what the compiler said."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    include = Path(torch.__file__).parent / "include"
    flags = COMPILE.format(here=HERE).split() + (["-fopenmp"] if threads > 1 else [])
    objects = []
    for name in SOURCES:
        objects.append(folder / f"{LIBRARY}-{name}.o")
        run([get_cpp_compiler(), *flags, f"-DTHREADS={threads}", f"-I{include}", str(HERE / name), "-o", str(objects[-1])])
    made = folder / f"lib{LIBRARY}.a"
    made.unlink(missing_ok=True)
    run(["ar", "rcsD", str(made), *map(str, objects)])
    return made


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise ExportError(f"the CPU kernels could not be compiled by {command[0]}: {said}; set compile.kernels=false")
