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
from torch import fx, nn

from ....runtime.backends.tensorrt import TENSORRT_PACKAGES, engine_logger
from ....runtime.errors import ExportError, RecipeError
from ....runtime.extras import install_command
from ....runtime.gpu.capability import CAPABILITY_KEY, CUDA_KEY
from ....runtime.storage.user_cache import read_private, write_private
from ...passes.captured_graph import CapturedGraph, GraphPass
from ...passes.fold import find_tensor
from .. import CodeFiles, GraphCompiler, GraphGroups
from ..int8_weights import refuse_components
from ..onnx import rewrite
from ..options import OnnxOptions, read_options, refuse_range
from ..w8a8 import quantize_layers as quantize_layers  # by one operator that ONNX models have a form for
from ..w8a8 import refuse_convolutions
from .network import build_network

CHANNELS_LAST = True
CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
ENGINE_SUFFIX = ".engine"
REPORTS_FOLDER = "reports/engines"
CAPABILITIES_OPTION = "compute_capabilities"
ENGINE_FILE, LAYERS_FILE = "model.engine", "layers.json"


class TensorRTOptions(OnnxOptions):
    """`compile.options`. `flavour` is the library: "rtx" is TensorRT-RTX. `compute_capabilities` are the GPUs that an RTX
    engine is for, by default those that its documentation names, or that multiply fp8; `workspace_mib` is the most scratch memory
    that the builder may plan with, 0 = all there is; `optimization_level` is the builder's own, 0 to 5. `cuda_graphs`: whether
    the runtime records an engine's work once and then launches it as a whole."""

    flavour: Literal["rtx", "tensorrt"] = "rtx"
    cuda_graphs: bool = False
    compute_capabilities: str = Field(default="sm80 sm86 sm89 sm120", pattern=r"^sm\d+( sm\d+)*$")
    workspace_mib: int = Field(default=0, ge=0)
    optimization_level: int = Field(default=3, ge=0, le=5)


def adapt_recipe(recipe: Any) -> tuple[Any, tuple[str, ...]]:
    """The recipe with the device that engines run on, and for fp8 with the GPUs that multiply it. Raises RecipeError where the recipe asks
    for others."""
    chosen, config, said = read_options(recipe.compile, TensorRTOptions), {}, []
    refuse_convolutions(recipe)
    refuse_range(
        recipe,
        "TensorRT needs an optimization profile for one, which prebake does not write; compile.backend=aoti has ranges",
    )
    refuse_components(recipe, "nobody has tried it with TensorRT, and compile.backend=aoti or onnxruntime has it")
    if recipe.compile.device != "cuda":
        config["device"] = "cuda"
        said.append("compile.device is cuda: engines of TensorRT run on GPUs")
    least, product = capability_sm(recipe.quantize.gpu_capability), recipe.quantize.treatment
    if least and chosen.flavour == "rtx":
        named = chosen.compute_capabilities.split()
        able = " ".join(name for name in named if int(name[2:]) >= least)
        if able != chosen.compute_capabilities:
            if CAPABILITIES_OPTION in recipe.compile.options:
                raise RecipeError(
                    f"compile.options.{CAPABILITIES_OPTION}: GPUs multiply {product} from sm{least} on, got {named[0]!r}; leave out "
                    "what is below, or set quantize.method=int8_dynamic"
                )
            config["options"] = {**recipe.compile.options, CAPABILITIES_OPTION: able}
            said.append(f"compile.options.{CAPABILITIES_OPTION} is {able}: GPUs multiply {product} from sm{least} on")
    return recipe.model_copy(update={"compile": recipe.compile.model_copy(update=config)}), tuple(said)


def capability_sm(capability: tuple[int, int]) -> int:
    """(8, 9) as in "sm89"; 0 where any GPU will do."""
    return 10 * capability[0] + capability[1]


def depends(config: Any) -> dict[str, str]:
    """The GPU that TensorRT chooses kernels on. TensorRT-RTX builds without one."""
    on_gpu = read_options(config, TensorRTOptions).flavour == "tensorrt"
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)} if on_gpu else {}


def requires(recipe: Any) -> dict[str, Any]:
    """The library and its exact version, the CUDA that its driver must have, and the GPUs; any torch."""
    chosen = read_options(recipe.compile, TensorRTOptions)
    trt = import_library(chosen)
    packages = {TENSORRT_PACKAGES[chosen.flavour]: trt.__version__, CAPABILITY_KEY: " ".join(list_capabilities(chosen))}
    return {"isa_level": "any", "isa": (), "packages": packages | find_cuda_release(TENSORRT_PACKAGES[chosen.flavour])}


def toolchain(config: Any) -> dict[str, str]:
    """The builder's settings, and what wrote its ONNX."""
    settings = read_options(config, TensorRTOptions).model_dump(exclude={"cuda_graphs"})
    chosen = {f"tensorrt.{name}": str(value) for name, value in settings.items()}
    return {**chosen, "onnx": onnx.__version__, "tensorrt.network": "strongly typed"}


def import_library(chosen: TensorRTOptions) -> Any:
    """The bindings. Raises ExportError where they are not installed, or cannot build on this machine."""
    name = TENSORRT_PACKAGES[chosen.flavour]
    try:
        trt = importlib.import_module(name)
    except ImportError as e:
        raise ExportError(f"compile.backend 'tensorrt': cannot import {name} ({e}); {install_command(name)}") from e
    if chosen.flavour == "tensorrt" and not torch.cuda.is_available():
        raise ExportError(
            "compile.options.flavour 'tensorrt': it builds on the GPU that the engine is for, and this torch sees none; "
            "set compile.options.flavour=rtx, which builds without"
        )
    return trt


def list_capabilities(chosen: TensorRTOptions) -> list[str]:
    """Compute capabilities of the GPUs that the engines are for, such as "sm89"."""
    if chosen.flavour == "tensorrt":
        return ["sm{}{}".format(*torch.cuda.get_device_capability())]
    return chosen.compute_capabilities.split()


def find_cuda_release(package: str) -> dict[str, str]:
    """The CUDA release that the installed wheel is for, by its name, which ends in `cu13` or `cu13_bindings`."""
    found = (re.search(r"cu(\d+)", name.lower()) for name in packages_distributions().get(package, ()))
    return next(({CUDA_KEY: match[1]} for match in found if match), {})


def list_passes(config: Any) -> tuple[GraphPass, ...]:
    """Those of ONNX, with Linears' weights as TensorRT reads them where they lie, as [out, in], and those of convolutions as
    [out, height, width, in]. It would lay others out anew at every call."""
    return (*rewrite.list_passes(transpose=False), lay_channels_last)


def lay_channels_last(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with its convolutions' weights as [out, height, width, in].

    before  y = conv2d(x, weight)       with weight.stride() == (C * H * W, H * W, W, 1)
    after   y = conv2d(x, weight)       with weight.stride() == (H * W * C, 1, W * C, C)
    """
    weights = {str(n.args[1].target) for n in gm.graph.nodes if n.target in CONVOLUTIONS and n.args[1].op == "get_attr"}
    for name in weights:
        path, _, leaf = name.rpartition(".")
        lying = find_tensor(gm, name).detach().contiguous(memory_format=torch.channels_last)
        setattr(gm.get_submodule(path), leaf, nn.Parameter(lying, requires_grad=False))
    return gm


def lower(folder: Path, groups: GraphGroups, config: Any, made: GraphCompiler) -> dict[str, str]:
    """An engine for each graph, and its layers in `reports/engines`."""
    chosen = read_options(config, TensorRTOptions)
    trt = import_library(chosen)

    def built(graph: CapturedGraph) -> CodeFiles:
        engine, layers = build_engine(trt, graph, chosen)
        return {ENGINE_FILE: engine, LAYERS_FILE: (json.dumps(layers, indent=1) + "\n").encode()}

    (folder / "graphs").mkdir(parents=True, exist_ok=True)
    (folder / REPORTS_FOLDER).mkdir(parents=True, exist_ok=True)
    paths = {}
    for component, graphs in groups.items():
        for graph in graphs:
            files = made(component, graph, built)
            paths[graph.name] = f"graphs/{graph.name}{ENGINE_SUFFIX}"
            (folder / paths[graph.name]).write_bytes(files[ENGINE_FILE])
            (folder / REPORTS_FOLDER / f"{graph.name}.json").write_bytes(files[LAYERS_FILE])
    return paths


def has_batch_graphs(config: Any) -> bool:
    """Always: engines run on GPUs."""
    return True


def reproducible(config: Any) -> bool:
    """TensorRT chooses kernels by their times on its GPU. TensorRT-RTX, which builds without one, gives the same bytes."""
    return read_options(config, TensorRTOptions).flavour == "rtx"


def build_engine(trt: Any, graph: CapturedGraph, chosen: TensorRTOptions) -> tuple[bytes, list[dict[str, Any]]]:
    """The engine of a graph, and its layers. Raises ExportError naming the graph and what the library refuses."""
    return build_model_engine(trt, graph.name, build_network(graph, chosen.opset), chosen)


def build_model_engine(
    trt: Any, name: str, model: onnx.ModelProto, chosen: TensorRTOptions
) -> tuple[bytes, list[dict[str, Any]]]:
    """The engine of a model. Whatever the library says meanwhile is what its layers are read from."""
    log = engine_logger(trt)
    log.errors.clear()
    log.lines = said = []
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(model.SerializeToString())
    config = configure_builder(trt, builder, chosen)
    engine = builder.build_serialized_network(network, config) if parsed else None
    log.lines = None
    if engine is None:
        refused = [parser.get_error(i) for i in range(parser.num_errors)]
        why = refused[0].desc() or refused[0].node_operator() if refused else next(iter(log.errors), "no message")
        raise ExportError(
            f"graph {name!r}: {trt.__name__} {trt.__version__} cannot build it ({why}); set compile.backend=aoti"
        )
    if chosen.flavour == "tensorrt":
        write_private(None, timing_cache_name(trt), bytes(config.get_timing_cache().serialize()))
    return bytes(engine), list(parse_layers(said))


def configure_builder(trt: Any, builder: Any, chosen: TensorRTOptions) -> Any:
    """The builder's configuration. Names of layers are kept, so that the list of them can be read."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = chosen.optimization_level
    if chosen.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, chosen.workspace_mib << 20)
    if chosen.flavour == "rtx":
        targets = [compute_capability(trt, name) for name in list_capabilities(chosen)]
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(target, i)
    else:
        load_timing_cache(trt, config)
    return config


def load_timing_cache(trt: Any, config: Any) -> None:
    """Lets the builder measure each kernel once, and not once an export: what it measured is kept for this user. TensorRT-RTX
    measures nothing."""
    for measured in (read_private(None, timing_cache_name(trt)), b""):
        timings = config.create_timing_cache(measured)
        if timings is not None and config.set_timing_cache(timings, False):
            return


def timing_cache_name(trt: Any) -> str:
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


LAYER_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+,.*? Metadata: ?(?P<metadata>.*)"
)
TENSOR_PATTERN = re.compile(r"Name: (?P<name>.*?), Dimensions: \[(?P<shape>[\d,]*)\].*?Datatype: (?P<dtype>\w+)")


def parse_layers(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The engine's layers in the order of their names in the log: name, type, tensors, and the ONNX nodes in it.

    Read from the log since the library's own inspector wants a GPU.
    """
    for match in filter(None, map(LAYER_LINE.fullmatch, map(str.strip, lines))):
        yield {
            "name": match["name"],
            "type": match["type"],
            "inputs": [parse_tensor(m) for m in TENSOR_PATTERN.finditer(match["inputs"])],
            "outputs": [parse_tensor(m) for m in TENSOR_PATTERN.finditer(match["outputs"])],
            "tactic": match["tactic"],
            "onnx": re.findall(r"\[ONNX Layer: (.*?)\]", match["metadata"]),
        }


def parse_tensor(found: re.Match[str]) -> dict[str, Any]:
    return {
        "name": found["name"],
        "shape": [int(n) for n in found["shape"].split(",") if n],
        "dtype": found["dtype"],
    }
