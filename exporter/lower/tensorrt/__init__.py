"""TensorRT: captured graphs in, an engine for each of them out, with no weights in it: they are inputs of its network.

The twin of `runtime/backends/tensorrt.py`. What goes to the builder is the model of `tensorrt_network.py`, strongly typed, of
fixed shapes, with each constant as an input of the constant's name, so that the engines of all variants are bound to the
same tensors. TensorRT-RTX builds on a machine without a GPU, TensorRT on one that has the GPU that the engine is for.
What the builder made of a graph is written down beside the code, in `reports/engines`, layer by layer.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from pydantic import Field
from torch import nn

from ....runtime.backends.tensorrt import PACKAGES, logger
from ....runtime.errors import ExportError, RecipeError
from ....runtime.extras import way_to
from ....runtime.gpu.capability import CAPABILITY, CUDA
from ....runtime.storage.user_cache import keep, kept
from ...passes.captured_graph import Captured
from ...passes.fold import get_tensor
from .. import Files, Groups, Made
from ..onnx import rewrite
from ..options import OnnxOptions, options
from ..w8a8 import quantized as quantized  # by one operator that ONNX models have a form for
from ..w8a8 import refuse_convolutions
from .network import network

CHANNELS_LAST = True
CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
SUFFIX = ".engine"
REPORTS = "reports/engines"
CAPABILITIES = "compute_capabilities"
FP8_FROM = 89
ENGINE, LAYERS = "model.engine", "layers.json"


class Options(OnnxOptions):
    """`compile.options`. `flavour` is the library: "rtx" is TensorRT-RTX. `compute_capabilities` are the GPUs that an RTX
    engine is for, by default those that its documentation names, or that multiply fp8; `workspace_mib` is the most scratch memory
    that the builder may plan with, 0 = all there is; `optimization_level` is the builder's own, 0 to 5. `cuda_graphs`: whether
    the runtime records an engine's work once and then launches it as a whole."""

    flavour: Literal["rtx", "tensorrt"] = "rtx"
    cuda_graphs: bool = False
    compute_capabilities: str = Field(default="sm80 sm86 sm89 sm120", pattern=r"^sm\d+( sm\d+)*$")
    workspace_mib: int = Field(default=0, ge=0)
    optimization_level: int = Field(default=3, ge=0, le=5)


def adapted(recipe: Any) -> tuple[Any, tuple[str, ...]]:
    """With the device that engines run on, and for fp8 with the GPUs that multiply it. Raises RecipeError where the recipe asks
    for others."""
    chosen, config, said = options(recipe.compile, Options), {}, []
    refuse_convolutions(recipe)
    if recipe.compile.device != "cuda":
        config["device"] = "cuda"
        said.append("compile.device is cuda: engines of TensorRT run on GPUs")
    if recipe.quantize.method == "fp8_dynamic" and chosen.flavour == "rtx":
        named = chosen.compute_capabilities.split()
        able = " ".join(name for name in named if int(name[2:]) >= FP8_FROM)
        if able != chosen.compute_capabilities:
            if CAPABILITIES in recipe.compile.options:
                raise RecipeError(
                    f"compile.options.{CAPABILITIES}: GPUs multiply fp8 from sm{FP8_FROM} on, got {named[0]!r}; leave out what "
                    "is below, or set quantize.method=int8_dynamic"
                )
            config["options"] = {**recipe.compile.options, CAPABILITIES: able}
            said.append(f"compile.options.{CAPABILITIES} is {able}: GPUs multiply fp8 from sm{FP8_FROM} on")
    return recipe.model_copy(update={"compile": recipe.compile.model_copy(update=config)}), tuple(said)


def depends(config: Any) -> dict[str, str]:
    """The GPU that TensorRT chooses kernels on. TensorRT-RTX builds without one."""
    on_gpu = options(config, Options).flavour == "tensorrt"
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)} if on_gpu else {}


def requires(recipe: Any) -> dict[str, Any]:
    """The library and its exact version, the CUDA that its driver must have, and the GPUs; any torch."""
    chosen = options(recipe.compile, Options)
    trt = library(chosen)
    packages = {PACKAGES[chosen.flavour]: trt.__version__, CAPABILITY: " ".join(capabilities(chosen))}
    return {"isa_level": "any", "isa": (), "packages": packages | cuda_of(PACKAGES[chosen.flavour])}


def toolchain(config: Any) -> dict[str, str]:
    """The builder's settings, and what wrote its ONNX."""
    settings = options(config, Options).model_dump(exclude={"cuda_graphs"})
    chosen = {f"tensorrt.{name}": str(value) for name, value in settings.items()}
    return {**chosen, "onnx": onnx.__version__, "tensorrt.network": "strongly typed"}


def library(chosen: Options) -> Any:
    """The bindings. Raises ExportError where they are not installed, or cannot build on this machine."""
    name = PACKAGES[chosen.flavour]
    try:
        trt = importlib.import_module(name)
    except ImportError as e:
        raise ExportError(f"compile.backend 'tensorrt': cannot import {name} ({e}); {way_to(name)}") from e
    if chosen.flavour == "tensorrt" and not torch.cuda.is_available():
        raise ExportError(
            "compile.options.flavour 'tensorrt': it builds on the GPU that the engine is for, and this torch sees none; "
            "set compile.options.flavour=rtx, which builds without"
        )
    return trt


def capabilities(chosen: Options) -> list[str]:
    """Compute capabilities of the GPUs that the engines are for, such as "sm89"."""
    if chosen.flavour == "tensorrt":
        return ["sm{}{}".format(*torch.cuda.get_device_capability())]
    return chosen.compute_capabilities.split()


def cuda_of(package: str) -> dict[str, str]:
    """The CUDA release that the installed wheel is for, by its name, which ends in `cu13` or `cu13_bindings`."""
    found = (re.search(r"cu(\d+)", name.lower()) for name in packages_distributions().get(package, ()))
    return next(({CUDA: match[1]} for match in found if match), {})


def rewritten(graph: Captured, config: Any) -> Captured:
    """The graph as ONNX can say it, its weights as TensorRT reads them where they lie: those of Linears as [out, in], those
    of convolutions as [out, height, width, in]. It would lay others out anew at every call."""
    made = rewrite.rewritten(graph, transpose=False)
    weights = {
        str(n.args[1].target) for n in made.gm.graph.nodes if n.target in CONVOLUTIONS and n.args[1].op == "get_attr"
    }
    for name in weights:
        path, _, leaf = name.rpartition(".")
        lying = get_tensor(made.gm, name).detach().contiguous(memory_format=torch.channels_last)
        setattr(made.gm.get_submodule(path), leaf, nn.Parameter(lying, requires_grad=False))
    return made


def lower(folder: Path, groups: Groups, config: Any, made: Made) -> dict[str, str]:
    """An engine for each graph, and its layers in `reports/engines`."""
    chosen = options(config, Options)
    trt = library(chosen)

    def built(graph: Captured) -> Files:
        engine, layers = build(trt, graph, chosen)
        return {ENGINE: engine, LAYERS: (json.dumps(layers, indent=1) + "\n").encode()}

    (folder / "graphs").mkdir(parents=True, exist_ok=True)
    (folder / REPORTS).mkdir(parents=True, exist_ok=True)
    paths = {}
    for component, graphs in groups.items():
        for graph in graphs:
            files = made(component, graph, built)
            paths[graph.name] = f"graphs/{graph.name}{SUFFIX}"
            (folder / paths[graph.name]).write_bytes(files[ENGINE])
            (folder / REPORTS / f"{graph.name}.json").write_bytes(files[LAYERS])
    return paths


def reproducible(config: Any) -> bool:
    """TensorRT chooses kernels by their times on its GPU. TensorRT-RTX, which builds without one, gives the same bytes."""
    return options(config, Options).flavour == "rtx"


def build(trt: Any, graph: Captured, chosen: Options) -> tuple[bytes, list[dict[str, Any]]]:
    """The engine of a graph, and its layers. Raises ExportError naming the graph and what the library refuses."""
    return build_model(trt, graph.name, network(graph, chosen.opset), chosen)


def build_model(trt: Any, name: str, model: onnx.ModelProto, chosen: Options) -> tuple[bytes, list[dict[str, Any]]]:
    """The engine of a model. Whatever the library says meanwhile is what its layers are read from."""
    log = logger(trt)
    log.errors.clear()
    log.lines = said = []
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(model.SerializeToString())
    config = settings(trt, builder, chosen)
    engine = builder.build_serialized_network(network, config) if parsed else None
    log.lines = None
    if engine is None:
        refused = [parser.get_error(i) for i in range(parser.num_errors)]
        why = refused[0].desc() or refused[0].node_operator() if refused else next(iter(log.errors), "no message")
        raise ExportError(
            f"graph {name!r}: {trt.__name__} {trt.__version__} cannot build it ({why}); set compile.backend=aoti"
        )
    if chosen.flavour == "tensorrt":
        keep(None, timings_place(trt), bytes(config.get_timing_cache().serialize()))
    return bytes(engine), list(layers(said))


def settings(trt: Any, builder: Any, chosen: Options) -> Any:
    """The builder's configuration. Names of layers are kept, so that the list of them can be read."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = chosen.optimization_level
    if chosen.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, chosen.workspace_mib << 20)
    if chosen.flavour == "rtx":
        targets = [compute_capability(trt, name) for name in capabilities(chosen)]
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(target, i)
    else:
        give_timings(trt, config)
    return config


def give_timings(trt: Any, config: Any) -> None:
    """Lets the builder measure each kernel once, and not once an export: what it measured is kept for this user. TensorRT-RTX
    measures nothing."""
    for measured in (kept(None, timings_place(trt)), b""):
        timings = config.create_timing_cache(measured)
        if timings is not None and config.set_timing_cache(timings, False):
            return


def timings_place(trt: Any) -> str:
    return "tensorrt/{}-sm{}{}".format(trt.__version__, *torch.cuda.get_device_capability())


def compute_capability(trt: Any, name: str) -> Any:
    """TensorRT-RTX's word for "sm89". Raises RecipeError naming those it has."""
    known = [n.lower() for n in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", n)]
    if name not in known:
        raise RecipeError(
            f"compile.options.compute_capabilities: {trt.__name__} {trt.__version__} builds for "
            f"{', '.join(sorted(known, key=lambda n: int(n[2:])))}, got {name!r}"
        )
    return getattr(trt.ComputeCapability, name.upper())


# --- what the builder says -------------------------------------------------------------------------------------------


LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+,.*? Metadata: ?(?P<metadata>.*)"
)
TENSOR = re.compile(r"Name: (?P<name>.*?), Dimensions: \[(?P<shape>[\d,]*)\].*?Datatype: (?P<dtype>\w+)")


def layers(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The engine's layers in the order of their names in the log: name, type, tensors, and the ONNX nodes in it.

    Read from the log since the library's own inspector wants a GPU.
    """
    for match in filter(None, map(LAYER.fullmatch, map(str.strip, lines))):
        yield {
            "name": match["name"],
            "type": match["type"],
            "inputs": [tensor(m) for m in TENSOR.finditer(match["inputs"])],
            "outputs": [tensor(m) for m in TENSOR.finditer(match["outputs"])],
            "tactic": match["tactic"],
            "onnx": re.findall(r"\[ONNX Layer: (.*?)\]", match["metadata"]),
        }


def tensor(found: re.Match[str]) -> dict[str, Any]:
    return {
        "name": found["name"],
        "shape": [int(n) for n in found["shape"].split(",") if n],
        "dtype": found["dtype"],
    }
