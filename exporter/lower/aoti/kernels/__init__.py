"""CPU kernels of our own, for what AOTInductor leaves slow: attention, rotary embeddings, int8 layers and convolutions with
what lies around their product, and layers of few rows.

They are C++ in this folder, compiled when an artifact is exported and linked into its code, so that a runtime needs nothing
for them: Inductor calls them by torch's C interface, as it calls its own. They are written for AVX-512 and for AVX2, and use
VNNI and BF16 where the CPU has them (`target.py`); for other machines a graph stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .....runtime.errors import ExportError
from ....private_torch import cpp_compiler, operator_overload
from .operators import attention, few_rows, packed_w8a8, packed_w8a8_conv2d, rotary
from .target import KernelTarget

HERE = Path(__file__).parent
LIBRARY = "prebake_kernels"
COMPILE_ARGUMENTS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",  # or tiles of different heights might round differently
    "-fPIC",
    "-fvisibility=hidden",
)

_HANDLE, _HANDLES = "AtenTensorHandle", "const AtenTensorHandle*"
DECLARATIONS = {
    operator_overload(packed_w8a8): (
        f"AOTITorchError aoti_torch_cpu_packed_w8a8({_HANDLES}, int64_t, {_HANDLE}, {_HANDLE}, {_HANDLES}, int64_t, {_HANDLE}*)"
    ),
    operator_overload(packed_w8a8_conv2d): (
        f"AOTITorchError aoti_torch_cpu_packed_w8a8_conv2d({_HANDLE}, {_HANDLE}, {_HANDLE}, {_HANDLES}, int64_t, int64_t, int64_t, "
        f"int64_t, double, {_HANDLES}, {_HANDLES}, {_HANDLE}*)"
    ),
    operator_overload(
        few_rows
    ): f"AOTITorchError aoti_torch_cpu_few_rows({_HANDLE}, {_HANDLE}, {_HANDLES}, {_HANDLE}*)",
    operator_overload(
        attention
    ): f"AOTITorchError aoti_torch_cpu_attention({_HANDLE}, {_HANDLE}, {_HANDLE}, double, {_HANDLE}*)",
    operator_overload(
        rotary
    ): f"AOTITorchError aoti_torch_cpu_rotary({_HANDLE}, {_HANDLE}, {_HANDLE}, int64_t, {_HANDLE}*)",
}
OPERATORS = tuple(DECLARATIONS)


@contextmanager
def link_kernels(
    folder: Path, gm: fx.GraphModule, threads: int, target: KernelTarget | None
) -> Iterator[dict[str, Any]]:
    """Inductor's options for a graph that calls kernels, which are compiled into `folder` if they are not there; none for others."""
    if not any(node.target in OPERATORS for node in gm.graph.nodes):
        yield {}
        return
    assert target is not None, "a graph calls kernels, and nobody said for which CPUs"
    library = build_archive(folder, threads, target)
    before = os.environ.get("LIBRARY_PATH")  # where the linker looks, and no file that it writes says so
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(library.parent), before)))
    try:
        yield {
            "aot_inductor.custom_ops_to_c_shims": {op: [DECLARATIONS[op]] for op in OPERATORS},
            "aot_inductor.custom_op_libs": [LIBRARY],
        }
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before


def sources_hash(target: KernelTarget) -> str:
    """A short hash of the kernels' sources and of how they are compiled."""
    sources = [p.read_bytes() for p in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])]
    told = repr((COMPILE_ARGUMENTS, target.arguments))
    return hashlib.sha256(b"".join([told.encode(), *sources])).hexdigest()[:12]


def build_archive(folder: Path, threads: int, target: KernelTarget) -> Path:
    """The static library of kernels whose loops fork so many threads, in a folder named by all that goes into it.

    Raises ExportError with what the compiler said.
    """
    include = Path(torch.__file__).parent / "include"
    parallel = ["-fopenmp"] if threads > 1 else []
    command = [cpp_compiler(), *COMPILE_ARGUMENTS, *target.arguments, *parallel, f"-DTHREADS={threads}"]
    sources = sorted(HERE.glob("*.cpp"))
    parts = [
        repr(command).encode(),
        torch.__version__.encode(),
        *(p.read_bytes() for p in [*sources, *HERE.glob("*.h")]),
    ]
    place = folder / f"kernels-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"
    made = place / f"lib{LIBRARY}.a"
    if made.is_file():
        return made
    place.mkdir(exist_ok=True)
    objects = [place / f"{source.stem}.o" for source in sources]
    shorter = f"-ffile-prefix-map={HERE}=prebake"
    made_of = [
        [*command, shorter, f"-I{include}", "-c", str(source), "-o", str(place / f"{source.stem}.o")]
        for source in sources
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as compilers:
        list(compilers.map(run_command, made_of))
    partial = place / "partial.a"
    partial.unlink(missing_ok=True)
    run_command(["ar", "rcsD", str(partial), *map(str, objects)])
    return partial.rename(made)


def run_command(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise ExportError(
            f"the CPU kernels could not be compiled ({command[0]}: {said}); set compile.options.kernels=false to do without"
        )
