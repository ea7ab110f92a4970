"""ONNX Runtime: an `.onnx` file for each graph, without weights; the twin of `runtime/backends/onnxruntime.py`.

What is stored is the graph as it was captured. The kernels are chosen, and the graph is optimized, where it is opened, so
that one artifact serves every processor of the family. int8 Linears are those of `w8a8.py`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript
import torch

from ...runtime.backends.onnxruntime import ONNXRUNTIME_PACKAGES, version_problems
from ...runtime.errors import ExportError, RecipeError
from ..passes.captured_graph import CapturedGraph, GraphPass
from . import CodeFiles, GraphCompiler, GraphGroups
from .aoti.isa import int8_flags
from .onnx import rewrite
from .onnx.graph import find_weight_data, locate_data, onnx_model
from .options import OnnxOptions, read_options, refuse_range
from .w8a8 import quantize_layers, refuse_convolutions

__all__ = [
    "CHANNELS_LAST",
    "adapt_recipe",
    "bind",
    "has_batch_graphs",
    "kernel_version",
    "list_passes",
    "lower",
    "quantize_layers",
    "reproducible",
    "requires",
    "stand_in",
    "toolchain",
]

CHANNELS_LAST = False
MODEL_FILE = "model.onnx"


class OnnxRuntimeOptions(OnnxOptions):
    """`compile.options`. `prepack`: whether each session keeps its weights once more, in the order in which its kernels read
    them; None = where one session alone reads them, for variants of a denoiser would each keep their copy."""

    prepack: bool | None = None


def adapt_recipe(recipe: Any) -> tuple[Any, tuple[str, ...]]:
    """On the CPU float32 where it says bfloat16, for which ONNX Runtime 1.32 has next to no kernels there: not one for MatMul.

    Raises RecipeError for options that there are not, for int8 convolutions, and for fp8: its optimizer makes products of int8 of
    such. Raises ExportError where the ONNX Runtime here is one that no artifact is opened with.
    """
    if problem := next(version_problems(ONNXRUNTIME_PACKAGES[recipe.compile.device]), None):
        raise ExportError(f"compile.backend 'onnxruntime': {problem}")
    read_options(recipe.compile, OnnxRuntimeOptions)
    refuse_convolutions(recipe)
    refuse_range(
        recipe, "prebake writes graphs for ONNX Runtime with fixed axes, and only compile.backend=aoti has ranges"
    )
    if not recipe.quantize.on_cpu:
        raise RecipeError(
            f"quantize.method {recipe.quantize.method!r}: ONNX Runtime has no product of {recipe.quantize.treatment}; set "
            "quantize.method=int8_dynamic, or "
            "compile.backend=tensorrt"
        )
    parts = [part for part, dtype in recipe.precision if dtype == "bfloat16"]
    if recipe.compile.device != "cpu" or not parts:
        return recipe, ()
    precision = recipe.precision.model_copy(update=dict.fromkeys(parts, "float32"))
    said = f"{', '.join(f'precision.{part}' for part in parts)}: float32, since ONNX Runtime has no bfloat16 on the CPU"
    return recipe.model_copy(update={"precision": precision}), (said,)


def list_passes(config: Any) -> tuple[GraphPass, ...]:
    """Those of ONNX."""
    return rewrite.list_passes()


def lower(folder: Path, groups: GraphGroups, config: Any, made: GraphCompiler) -> dict[str, str]:
    """A model for each graph."""
    opset = read_options(config, OnnxRuntimeOptions).opset

    def translated(graph: CapturedGraph) -> CodeFiles:
        return {MODEL_FILE: onnx_model(graph, opset).SerializeToString(deterministic=True)}

    (folder / "graphs").mkdir(exist_ok=True)
    paths = {}
    for component, graphs in groups.items():
        for graph in graphs:
            paths[graph.name] = f"graphs/{graph.name}.onnx"
            (folder / paths[graph.name]).write_bytes(made(component, graph, translated)[MODEL_FILE])
    return paths


def stand_in(config: Any) -> Any:
    """What a session runs in the place of an operator, for forecasts."""
    from .onnx.single_call import SingleCalls

    chosen = read_options(config, OnnxRuntimeOptions)
    return SingleCalls(chosen.opset, config.threads or torch.get_num_threads(), prepack=bool(chosen.prepack)).stand_in


def kernel_version(config: Any) -> str:
    """ONNX Runtime's."""
    return f"onnxruntime {onnxruntime.__version__}"


def has_batch_graphs(config: Any) -> bool:
    """On a GPU."""
    return config.device == "cuda"


def reproducible(config: Any) -> bool:
    """Always: kernels are chosen where a model is opened."""
    return True


def bind(folder: Path, paths: Mapping[str, str], bound: Mapping[str, Mapping[str, str]]) -> None:
    """Writes into each graph where its constants lie: ONNX Runtime reads some of them when it optimizes the graph."""
    lie = find_weight_data(folder)
    for name, path in paths.items():
        model = onnx.load(folder / path, load_external_data=False)
        locate_data(model, {constant: lie[key] for constant, key in bound[name].items()})
        (folder / path).write_bytes(model.SerializeToString(deterministic=True))


def requires(recipe: Any) -> dict[str, Any]:
    """This ONNX Runtime or a newer one that was tried, any torch, and for int8 the instruction that its products are exact with."""
    return {
        "isa_level": platform.machine(),
        "isa": int8_flags() if recipe.quantize.multiplies_int8 else (),
        "packages": {"onnxruntime": onnxruntime.__version__},
    }


def toolchain(config: Any) -> dict[str, str]:
    """What wrote the graphs, and how many threads they were verified with."""
    return {
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "onnxscript": onnxscript.__version__,
        "threads": str(config.threads or torch.get_num_threads()),
    }
