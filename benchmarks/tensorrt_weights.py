"""Where the weights of several step variants go in TensorRT: what each of three ways costs in bytes and build time.

    inputs   an engine for each variant, weights as inputs of its network (what `exporter/lower/tensorrt/__init__.py` does)
    inside   an engine for each variant, with the weights in it
    if       one engine, with the weights in it, whose `If` chooses the variant

`python benchmarks/tensorrt_weights.py` builds all three for the full step and one variant of a FLUX of 1 double and 2
single blocks, 1024 wide, in bfloat16 and with int8 Linears, and prints a table. It needs TensorRT-RTX and no GPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import tensorrt_rtx as trt
from onnx import TensorProto, helper
from onnxscript.optimizer import fold_constants, remove_unused_nodes

from prebake.exporter.cli.quiet import silence_libraries
from prebake.exporter.lower.onnx.graph import embed_data, onnx_model
from prebake.exporter.lower.tensorrt import TensorRTOptions, build_model_engine, list_passes, network
from prebake.exporter.passes.captured_graph import CapturedGraph, run_passes
from prebake.exporter.pipeline import prepare
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.tiny import flux
from prebake.runtime.errors import ExportError

ATTENTION_HEADS = 32  # of 32
SETTINGS = (
    "compile.backend=tensorrt",
    "compile.device=cuda",
    "cache.method=pab",
    "cache.spatial_attention_timestep_skip_range=[0, 1000]",
)


def main() -> None:
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        flux.build(heads=ATTENTION_HEADS).save_pretrained(folder)
        print(
            "| Linears | weights | way | engines | engine bytes | build s | weights laid out anew at each full step |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for method in ("none", "int8_dynamic"):
            with open_progress("quiet") as quiet:
                prepared = prepare(resolve("flux-fast", (*SETTINGS, f"quantize.method={method}"), folder), quiet)
            passes = list_passes(None)
            full, *others = (run_passes(graph, passes) for graph in prepared.graphs["denoiser"])
            pair = (full, max(others, key=lambda g: prepared.costs[g.name].flops))
            weights = {t.data_ptr(): t.nbytes for graph in pair for t in graph.constants().values()}
            for way, models in (
                ("inputs", [network(g) for g in pair]),
                ("inside", [fold_model(inline_constants(g)) for g in pair]),
                ("if", [fold_model(join_models([inline_constants(g) for g in pair]))]),
            ):
                start = time.perf_counter()
                try:
                    built = [build_model_engine(trt, way, model, TensorRTOptions()) for model in models]
                except ExportError as e:
                    print(
                        f"| {method} | {sum(weights.values()):,} | {way} | not built: {' '.join(str(e).split())} | | | |"
                    )
                    continue
                seconds = time.perf_counter() - start
                size = sum(len(engine) for engine, _ in built)
                print(
                    f"| {method} | {sum(weights.values()):,} | {way} | {len(built)} | {size:,} | {seconds:.1f} | "
                    f"{moved_bytes(built[0][1], full) if way == 'inputs' else 0:,} |"
                )


def inline_constants(graph: CapturedGraph) -> onnx.ModelProto:
    """The graph with the values of its constants inside."""
    return embed_data(onnx_model(graph), graph.constants())


def fold_model(model: onnx.ModelProto) -> onnx.ModelProto:
    made = ir.from_proto(model)
    fold_constants(made, onnx_shape_inference=False, input_size_limit=64, output_size_limit=64)
    remove_unused_nodes(made)
    return ir.to_proto(made)


def join_models(models: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """One model of two: an input `first` says which of them gives the outputs. Outputs that one lacks are zeros of it."""
    inputs = {i.name: i for model in models for i in model.graph.input}
    outputs = {o.name: o for model in models for o in model.graph.output}
    shared = {t.name: t for model in models for t in model.graph.initializer if t.name in shared_names(models)}
    branches = [rename_branch(model.graph, f"{i}_", shared, outputs) for i, model in enumerate(models)]
    node = helper.make_node("If", ["first"], list(outputs), then_branch=branches[0], else_branch=branches[1])
    first = helper.make_tensor_value_info("first", TensorProto.BOOL, ())
    graph = helper.make_graph(
        [node], "either", [first, *inputs.values()], list(outputs.values()), list(shared.values())
    )
    return helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)


def shared_names(models: Sequence[onnx.ModelProto]) -> set[str]:
    """Names that hold the same in all the models that have them."""
    held: dict[str, set[bytes]] = {}
    for model in models:
        for t in model.graph.initializer:
            held.setdefault(t.name, set()).add(t.SerializeToString())
    return {name for name, values in held.items() if len(values) == 1}


def rename_branch(graph: onnx.GraphProto, prefix: str, shared: Any, outputs: dict[str, onnx.ValueInfoProto]) -> Any:
    """The graph as a branch: its own names with a prefix, the shared ones and the inputs as they are."""
    outer = {*shared, *(i.name for i in graph.input), ""}

    def named(name: str) -> str:
        return name if name in outer else prefix + name

    nodes = []
    for node in graph.node:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.name = prefix + node.name
        made.input[:] = map(named, node.input)
        made.output[:] = map(named, node.output)
        nodes.append(made)
    own = [t for t in graph.initializer if t.name not in shared]
    for t in own:
        t.name = prefix + t.name
    present = {o.name for o in graph.output}
    results = []
    for name, info in outputs.items():
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        dtype = info.type.tensor_type.elem_type
        if name not in present:
            zero = helper.make_tensor("", dtype, (1,), b"\0" * (2 if dtype == TensorProto.BFLOAT16 else 4), raw=True)
            own.append(helper.make_tensor(f"{prefix}{name}_shape", TensorProto.INT64, (len(shape),), shape))
            nodes.append(helper.make_node("ConstantOfShape", [f"{prefix}{name}_shape"], [named(name)], value=zero))
        results.append(helper.make_tensor_value_info(named(name), dtype, shape))
    return helper.make_graph(nodes, prefix, [], results, own)


def moved_bytes(layers: list[dict[str, Any]], graph: CapturedGraph) -> int:
    """Bytes of the weights that a layer does nothing with but move."""
    weights = graph.constants()
    moves = [layer for layer in layers if layer["name"].startswith("__myl_Move_")]
    return sum(weights[t["name"]].nbytes for layer in moves for t in layer["inputs"] if t["name"] in weights)


if __name__ == "__main__":
    main()
