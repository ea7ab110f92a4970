"""AOTInductor: captured graphs in, one `.pt2` out, with all its models in it and no constants.

The twin of `runtime/backends/aoti.py`. Constants stay outside so that every variant reads one copy; the archive holds
shared objects and their metadata and nothing that a loader would compile or run in another way. Bytes are reproducible,
wherever they are made: sources have fixed names, and paths that the compiler would write into the code are cut short.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....runtime.errors import ExportError, RecipeError
from ...passes.captured_graph import CapturedGraph, GraphPass
from ...passes.derived_weights import DerivedWeights
from ...private_torch import (
    compile_graph_module,
    cpp_compiler,
    has_inductor_flag,
    inductor_config,
    inductor_key,
    unwrap_subclass_parameters,
)
from ...tables import RecipeTable
from .. import CodeFiles, GraphCompiler, GraphGroups, w8a8
from ..options import read_options, refuse_range
from ..toolchain import glibc_version
from . import cuda, kernels
from .building import build_folder, check_build_place, describe_compile_error
from .isa import choose_isa, host_flags, inductor_flags, int8_flags, multiplies_bfloat16
from .kernels.rewrite import replace_operators
from .kernels.target import EXTENSIONS, KernelTarget, choose_target
from .pt2 import clear_executable_stack, is_packaged, weaken_unique_symbols, write_package

LINE_TABLES_FLAG = "aot_inductor.enable_line_tables"
"""A flag that torch 2.11 has not, nor such tables."""
PACKAGE_FLAGS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    # folded or merged weights would vanish from the list of constants, and could not be swapped later
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    # as data, not as text for the assembler, which says nothing of the stack; see `clear_executable_stack`
    "aot_inductor.use_consts_asm_build": False,
    # tables of which line of which file an instruction comes from: of sources that are not kept, in folders of this machine
    LINE_TABLES_FLAG: False,
    # else a hash of the sources, which name their folders
    "aot_inductor.model_name_for_generated_files": "model",
}
TORCHAO_LEVEL = "x86-64-v4"
"""By name a level at which int8 layers are torchao's, which ask at run time whether the CPU has VNNI: the kernels would do without."""
CHANNELS_LAST = True
PACKAGE_SUFFIX = ".pt2"
COMPILER_VARIABLES = re.compile(
    r"C(PLUS_INCLUDE_)?PATH|C_INCLUDE_PATH|LIBRARY_PATH|COMPILER_PATH|GCC_EXEC_PREFIX|OMP_PREFIX|CXX|"
    r"(TORCHINDUCTOR|TORCH_INDUCTOR|AOT_?INDUCTOR)_(?!CACHE_DIR$).*"
)
"""What g++ and Inductor read while they compile."""


def compile_flags(config: Any) -> dict[str, Any]:
    """Inductor's options for the recipe's `compile` table: packaging, instruction set, and the recipe's own flags."""
    level, _ = choose_isa(config.isa)
    device = cuda.cuda_flags(read_options(config, AotiOptions)) if is_on_gpu(config) else {}
    packaged = {name: value for name, value in PACKAGE_FLAGS.items() if name != LINE_TABLES_FLAG or has_line_tables()}
    return {**packaged, **device, "cpp.threads": thread_count(config), **inductor_flags(level), **config.inductor}


def has_line_tables() -> bool:
    return has_inductor_flag(LINE_TABLES_FLAG)


def adapt_recipe(recipe: Any) -> tuple[Any, tuple[str, ...]]:
    """On CPUs without instructions for bfloat16 float32 where it says that, unless it says `emulate_bfloat16`: torch makes such products
    one number at a time there. Raises RecipeError for a GPU that is not here, for kernels that this machine cannot run, and for fp8 on
    the CPU: torch makes such products by way of wider numbers there, and slower than those of float32 (docs/reference/backends.md)."""
    check_build_place()
    chosen = read_options(recipe.compile, AotiOptions)
    if is_on_gpu(recipe.compile):
        if for_cpu := next((name for name in ("kernels", "emulate_bfloat16") if getattr(chosen, name)), None):
            raise RecipeError(
                f"compile.options.{for_cpu}: for the CPU alone, and compile.device is cuda; leave the option out"
            )
        if chosen.cuda_graphs:
            refuse_range(recipe, "compile.options.cuda_graphs records a trajectory of one size")
        cuda.check_gpu_recipe(recipe)
        return recipe, ()
    if gpu_only := sorted({"cuda_graphs", "multi_arch", "tf32"} & recipe.compile.options.keys()):
        raise RecipeError(
            f"compile.options.{gpu_only[0]}: it is for GPUs, and compile.device is cpu; leave the option out"
        )
    if chosen.kernels and not has_kernels(recipe.compile):
        raise RecipeError(
            f"compile.options.kernels: they are written for {' and '.join(EXTENSIONS)}, so the result could not be verified with "
            f"compile.isa={recipe.compile.isa} on this CPU; leave the option out, or export on such a machine"
        )
    if not has_kernels(recipe.compile):
        w8a8.refuse_convolutions(recipe)
    if not recipe.quantize.on_cpu:
        raise RecipeError(
            f"quantize.method {recipe.quantize.method!r}: a CPU multiplies {recipe.quantize.treatment} slower than float32; set "
            "quantize.method=int8_dynamic, or on a "
            "machine with a GPU compile.device=cuda, or compile.backend=tensorrt"
        )
    parts = [part for part, dtype in recipe.precision if dtype == "bfloat16"]
    if not parts or chosen.emulate_bfloat16 or multiplies_bfloat16(choose_isa(recipe.compile.isa)[0]):
        return recipe, ()
    said = (
        f"{', '.join(f'precision.{part}' for part in parts)}: float32, since this CPU, or compile.isa={recipe.compile.isa}, has no "
        "instructions for bfloat16, whose products take several times as long then; compile.options.emulate_bfloat16=true keeps it, "
        "for half of the memory"
    )
    precision = recipe.precision.model_copy(update=dict.fromkeys(parts, "float32"))
    return recipe.model_copy(update={"precision": precision}), (said,)


class AotiOptions(RecipeTable):
    """`kernels`: whether attention in bfloat16 and int8 layers are prebake's own code, `kernels/`. By default, unless
    `compile.isa` names `TORCHAO_LEVEL`. `emulate_bfloat16`: whether what a recipe has in bfloat16 stays so where no instruction
    multiplies it. The others are for GPUs: `cuda.CudaOptions`, and `cuda_graphs`, by which the runtime records whole trajectories (`runtime/recorded.py`)."""

    kernels: bool | None = None
    emulate_bfloat16: bool = False
    multi_arch: bool = False
    tf32: bool = True
    cuda_graphs: bool = False


def is_on_gpu(config: Any) -> bool:
    return config.device == "cuda"


def has_kernels(config: Any) -> bool:
    return kernel_target(config) is not None


def kernel_target(config: Any) -> KernelTarget | None:
    """What the kernels are compiled for; None without them. A level that is asked for by name is a promise to machines that have
    nothing else, so there they use the level alone, unless they are asked for too."""
    asked = read_options(config, AotiOptions).kernels
    if is_on_gpu(config) or asked is False or (asked is None and config.isa == TORCHAO_LEVEL):
        return None
    return choose_target(config.isa, extended=bool(asked) or config.isa in ("host", "native"))


def thread_count(config: Any) -> int:
    """How many threads the loops of the compiled code fork, `compile.threads` or what torch uses here.

    Inductor writes the number into each loop that is worth splitting. Its alternative, asking at run time, splits every
    loop, however small.
    """
    return config.threads or torch.get_num_threads()


def toolchain(config: Any) -> dict[str, str]:
    """The threads, GPU and compiler versions that went into the code, for the manifest."""
    return {"threads": str(thread_count(config)), **(cuda.cuda_toolchain() if is_on_gpu(config) else {})}


def has_batch_graphs(config: Any) -> bool:
    """On a GPU."""
    return is_on_gpu(config)


def reproducible(config: Any) -> bool:
    """Whether equal graphs give equal bytes: unless Inductor chooses kernels by their times, as it always does on a GPU."""
    return not is_on_gpu(config) and not any(
        value for name, value in config.inductor.items() if "autotune" in name or "benchmark" in name
    )


def depends(config: Any) -> dict[str, str]:
    """Inductor's sources and settings, torch's switches, the compiler with what it takes from the environment, and the CPU."""
    settings = inductor_config().save_config_portable()
    written = {k: v for k, v in settings.pop("aot_inductor.metadata", {}).items() if not k.startswith("AOTI_")}
    switches = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    return {
        "inductor": inductor_key().hex(),
        "settings": repr(sorted(settings.items())),
        "metadata": repr(sorted(written.items())),
        "flags": repr(sorted(compile_flags(config).items())),
        "torch": repr((*switches, torch.get_default_dtype(), torch.backends.mkldnn.enabled)),
        "compiler": describe_compiler(),
        "environment": repr({k: v for k, v in sorted(os.environ.items()) if COMPILER_VARIABLES.fullmatch(k)}),
        "cpu": " ".join(sorted(host_flags())),
    }


def describe_compiler() -> str:
    """Path and version text of the C++ compiler, by which distributions tell their builds apart; empty
    without one, which is an error only where something is to be compiled."""
    try:
        path = shutil.which(cpp_compiler()) or ""
        plain = {**os.environ, "LC_ALL": "C"}
        said = subprocess.run([path, "--version"], env=plain, capture_output=True, text=True, check=True).stdout
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return ""
    return f"{path}\n{said}"


def requires(recipe: Any) -> dict[str, Any]:
    """The instruction set, this torch and this C library."""
    level, flags = choose_isa(recipe.compile.isa)
    if target := kernel_target(recipe.compile):
        flags = tuple(sorted({*flags, *target.flags}))
    elif recipe.quantize.multiplies_int8 and not is_on_gpu(recipe.compile):
        flags = tuple(sorted({*flags, *int8_flags()}))
    return {
        "isa_level": level,
        "isa": flags,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "glibc": glibc_version(),
        "packages": cuda.required_packages(read_options(recipe.compile, AotiOptions))
        if is_on_gpu(recipe.compile)
        else {},
    }


def quantize_layers(model: nn.Module, names: set[str], recipe: Any) -> None:
    """Quantizes layers: for a GPU by `cuda.py`; on the CPU as the operator that a kernel computes, or by torchao, whose tensor subclasses are unwrapped at the end, so that every stored weight is a plain tensor."""
    if is_on_gpu(recipe.compile):
        cuda.quantize_layers(model, names, recipe.quantize)
        return
    if has_kernels(recipe.compile):
        w8a8.quantize_layers(model, names, recipe)
        return
    from torchao.quantization import quantize_

    quantize_(model, recipe.quantize.torchao_config(), lambda _, name: name in names)
    unwrap_subclass_parameters(model)


def stand_in(config: Any) -> Any:
    """The kernels in the place of what they replace, for forecasts; None without them."""
    target = kernel_target(config)
    if target is None:
        return None
    from .kernels.native import NativeKernels

    with build_folder() as place:
        return NativeKernels(place, thread_count(config), target).stand_in


def kernel_version(config: Any) -> str:
    """A hash of the kernels' sources and of what they are compiled for; empty without them."""
    target = kernel_target(config)
    return "" if target is None else kernels.sources_hash(target)


def list_passes(config: Any) -> tuple[GraphPass, ...]:
    """Calls of kernels where they fit; the rest is for Inductor's own passes."""
    return (partial(replace_operators, weights=DerivedWeights()),) if has_kernels(config) else ()


def lower(folder: Path, groups: GraphGroups, config: Any, made: GraphCompiler) -> dict[str, str]:
    """A package for each component."""
    chosen, paths = compile_flags(config), {}

    def compiled(graph: CapturedGraph) -> CodeFiles:
        if not is_on_gpu(config):
            return compile_graph(graph, chosen, target=kernel_target(config))
        with cuda.float32_as_tf32(read_options(config, AotiOptions).tf32):
            return compile_graph(cuda.move_graph(graph, torch.device("cuda")), chosen)

    for component, graphs in groups.items():
        files = {g.name: made(component, g, compiled) for g in graphs}
        path = f"graphs/{component}{PACKAGE_SUFFIX}"
        write_package(folder / path, files)
        paths |= dict.fromkeys(files, path)
    return paths


def compile_graph(
    graph: CapturedGraph, flags: dict[str, Any], folder: Path | None = None, *, target: KernelTarget | None = None
) -> CodeFiles:
    """Compiles one graph in a private `folder`, or the one of this user; returns those of Inductor's files that are kept.
    Kernels that it calls are compiled for `target`.

    Raises ExportError naming the graph when the compiler fails.
    """
    with build_folder(folder) as place:
        sources = place / "sources"  # Inductor does not write a file again that is there
        shutil.rmtree(sources, ignore_errors=True)
        options = {"aot_inductor.output_path": str(sources), **shorten_paths(flags, sources)}
        try:
            threads = flags.get("cpp.threads") or torch.get_num_threads()
            with kernels.link_kernels(place, graph.gm, threads, target) as linked:
                made = compile_graph_module(graph.gm, graph.args, options | linked)
            files = {Path(f).name: Path(f).read_bytes() for f in made if isinstance(f, str) and is_packaged(f)}
        except ExportError:
            raise
        except Exception as e:
            raise ExportError(
                f"graph {graph.name!r}: AOTInductor could not compile it ({describe_compile_error(e)})"
            ) from e
        shutil.rmtree(sources, ignore_errors=True)
    return {
        n: weaken_unique_symbols(clear_executable_stack(data)) if n.endswith(".so") else data
        for n, data in files.items()
    }


def shorten_paths(flags: dict[str, Any], sources: Path) -> dict[str, Any]:
    """The flags with two more for the compiler, behind `-march`, which is the only one that Inductor takes from its settings
    as it is: messages of assertions name their files, here by short names, as if all machines had them in one place.

    torch before 2.13 has no such setting, and other processors than x86 have no `-march=native`; there the flags stay.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not has_inductor_flag("cpp.march"):
        return flags
    short = {sources: "sources", Path(torch.__file__).parent: "torch"}
    maps = (f"-fmacro-prefix-map={shlex.quote(str(path))}={name}" for path, name in short.items())
    return {**flags, "cpp.march": " ".join((flags.get("cpp.march") or "native", *maps))}
