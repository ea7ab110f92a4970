"""AOTInductor: captured graphs in, one `.pt2` out, with all its models in it and no constants.

The twin of `runtime/backends/aoti.py`. Constants stay outside so that every variant reads one copy; the archive holds
shared objects and their metadata and nothing that a loader would compile or run in another way. Bytes are reproducible:
Inductor writes the paths of its sources into what it compiles, so it always works in the same folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...runtime.elf import EXECUTABLE, GNU_STACK
from ...runtime.errors import ExportError
from ..capture import Captured
from ..toolchain import glibc_version
from . import Groups
from .isa import choose, inductor_flags, int8_flags

PACKAGED = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    # folded or merged weights would vanish from the list of constants, and could not be swapped later
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    # as data, not as text for the assembler, which says nothing of the stack; see `without_executable_stack`
    "aot_inductor.use_consts_asm_build": False,
}
CHANNELS_LAST = True
SUFFIX = ".pt2"
KEPT_SUFFIXES = (".so", ".json", ".cubin")
EPOCH = (1980, 1, 1, 0, 0, 0)


def flags(config: Any) -> dict[str, Any]:
    """Inductor's options for the recipe's `compile` table: packaging, instruction set, and the recipe's own flags."""
    level, _ = choose(config.isa)
    return {**PACKAGED, "cpp.threads": threads(config), **inductor_flags(level), **config.inductor}


def adapted(recipe: Any) -> tuple[Any, tuple[str, ...]]:
    """As it is."""
    return recipe, ()


def threads(config: Any) -> int:
    """How many threads the loops of the compiled code fork, `compile.threads` or what torch uses here.

    Inductor writes the number into each loop that is worth splitting. Its alternative, asking at run time, splits every
    loop, however small.
    """
    return config.threads or torch.get_num_threads()


def toolchain(config: Any) -> dict[str, str]:
    """What else of this machine went into the code, for the manifest."""
    return {"threads": str(threads(config))}


def requires(recipe: Any) -> dict[str, Any]:
    """The instruction set, this torch and this C library."""
    level, flags = choose(recipe.compile.isa)
    if recipe.quantize.method == "int8_dynamic":
        flags = tuple(sorted({*flags, *int8_flags()}))
    return {
        "isa_level": level,
        "isa": flags,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "glibc": glibc_version(),
    }


def quantized(model: nn.Module, names: set[str]) -> None:
    """By torchao, whose tensor subclasses are unwrapped at the end, so that every stored weight is a plain tensor."""
    from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    # set_inductor_config would change Inductor's global flags behind the recipe's back
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), lambda _, name: name in names)
    unwrap_tensor_subclass_parameters(model)


def rewritten(graph: Captured) -> Captured:
    """As it is: Inductor has its own passes."""
    return graph


def lower(folder: Path, groups: Groups, config: Any, doing: Callable[[str], None]) -> dict[str, str]:
    """A package for each component. Raises ExportError for a device that the runtime has no AOTInductor models for."""
    if config.device != "cpu":
        raise ExportError(
            f"compile.device {config.device!r}: models of AOTInductor are opened on the cpu alone; set compile.device=cpu, "
            "or another compile.backend"
        )
    chosen, paths = flags(config), {}
    for component, graphs in groups.items():
        files = {}
        for graph in graphs:
            doing(f"{component}: {graph.name}" if component != graph.name else component)
            files[graph.name] = compile_graph(graph, chosen)
        path = f"graphs/{component}{SUFFIX}"
        write_package(folder / path, files)
        paths |= dict.fromkeys(files, path)
    return paths


def compile_graph(graph: Captured, flags: dict[str, Any], folder: Path | None = None) -> list[str]:
    """Compiles one graph in a private `folder`, or the one of this user; returns Inductor's files.

    Raises ExportError naming the graph when the compiler fails.
    """
    with build_folder(folder):
        try:
            files: Any = torch._inductor.aot_compile(graph.gm, graph.args, options=flags)
        except Exception as e:
            raise ExportError(
                f"graph {graph.name!r}: AOTInductor could not compile it ({type(e).__name__}: {first_line(e)})"
            ) from e
    return [str(f) for f in files]


def first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), "no message")


def write_package(path: Path, models: dict[str, list[Any]]) -> None:
    """One archive of all models, in torch's own layout, without sources, with fixed times and order."""
    from torch._inductor.package import package_aoti

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / path.name
        package_aoti(str(raw), models)
        with zipfile.ZipFile(raw) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
            members = {name: source.read(name) for name in sorted(source.namelist()) if wanted(name)}
            members |= {n: without_executable_stack(data) for n, data in members.items() if n.endswith(".so")}
            for name, data in members.items():
                is_id = name.endswith("/.data/serialization_id")
                target.writestr(zipfile.ZipInfo(name, EPOCH), serialization_id(members) if is_id else data)


def without_executable_stack(library: bytes) -> bytes:
    """The same ELF library, whose segment PT_GNU_STACK no longer asks for execution.

    torch 2.13 assembles the (empty) constants from text that does not say what stack it needs, and the linker takes that for
    a wish; glibc from 2.41 on refuses to load such a library. None of the code runs on its stack.
    """
    (start,), (size, count) = struct.unpack_from("<Q", library, 32), struct.unpack_from("<HH", library, 54)
    changed = bytearray(library)
    for at in range(start, start + size * count, size):
        kind, flags = struct.unpack_from("<II", library, at)
        if kind == GNU_STACK:
            struct.pack_into("<I", changed, at + 4, flags & ~EXECUTABLE)
    return bytes(changed)


def serialization_id(members: dict[str, bytes]) -> bytes:
    """Forty digits for what is kept; torch's own also covers the sources that are left out, which vary."""
    kept = hashlib.sha256()
    for name, data in members.items():
        if not name.endswith("/.data/serialization_id"):
            kept.update(name.encode() + hashlib.sha256(data).digest())
    return f"{int(kept.hexdigest(), 16) % 10**40:040d}".encode()


def wanted(member: str) -> bool:
    """Shared objects, kernels and metadata. `*compile_flags.json` would let a loader run a shell command."""
    inside_model = "/data/aotinductor/" in member
    return not inside_model or (member.endswith(KEPT_SUFFIXES) and not member.endswith("compile_flags.json"))


@contextlib.contextmanager
def build_folder(folder: Path | None = None) -> Iterator[Path]:
    """Inductor's working folder, held by one export at a time: for a user always the same path, since it is in the code.

    Raises ExportError when the place is not a private folder of this user (it will hold code that is loaded).
    """
    folder = folder or Path(tempfile.gettempdir()) / f"prebake-inductor-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ExportError(
            f"{folder}: expected a folder that only this user can open, because compiled code passes through it; remove it or set TMPDIR"
        )
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
