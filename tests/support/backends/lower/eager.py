"""A backend in a few lines: what is stored of a graph is the graph, and its weights come in as further inputs."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from prebake.exporter.lower import CodeFiles, GraphCompiler, GraphGroups
from prebake.exporter.passes.captured_graph import CapturedGraph, GraphPass
from prebake.runtime.errors import ExportError

CHANNELS_LAST = False


def adapt_recipe(recipe: Any) -> tuple[Any, tuple[str, ...]]:
    return recipe, ()


def quantize_layers(model: nn.Module, names: set[str], recipe: Any) -> None:
    raise ExportError("compile.backend 'eager' has no int8; set quantize.method=none")


def list_passes(config: Any) -> tuple[GraphPass, ...]:
    return ()


def lower(folder: Path, groups: GraphGroups, config: Any, made: GraphCompiler) -> dict[str, str]:
    (folder / "graphs").mkdir()
    paths = {g.name: f"graphs/{g.name}.pt2" for graphs in groups.values() for g in graphs}
    for component, graphs in groups.items():
        for graph in graphs:
            (folder / paths[graph.name]).write_bytes(made(component, graph, saved)["graph.pt2"])
    return paths


def saved(graph: CapturedGraph) -> CodeFiles:
    program = torch.export.export(lifted(graph), (*graph.args, *sorted_constants(graph)), strict=False)
    program._example_inputs = None  # among them are the weights
    file = io.BytesIO()
    torch.export.save(program, file)
    return {"graph.pt2": file.getvalue()}


def has_batch_graphs(config: Any) -> bool:
    return True


def reproducible(config: Any) -> bool:
    return True


def sorted_constants(graph: CapturedGraph) -> list[torch.Tensor]:
    return [tensor.detach() for _, tensor in sorted(graph.constants().items())]


def lifted(graph: CapturedGraph) -> fx.GraphModule:
    """The graph with its constants as inputs after its own, in the order of their names."""
    lifted = copy.deepcopy(graph.gm.graph)
    lifted.set_codegen(fx.graph.CodeGen())
    last = lifted.find_nodes(op="placeholder")[-1]
    for i, name in enumerate(sorted(graph.constants())):
        with lifted.inserting_after(last):
            last = lifted.placeholder(f"constant_{i}")
        for node in [n for n in lifted.find_nodes(op="get_attr") if n.target == name]:
            node.replace_all_uses_with(last)
            lifted.erase_node(node)
    return fx.GraphModule(graph.gm, lifted)


def requires(recipe: Any) -> dict[str, Any]:
    return {"isa_level": "any", "isa": (), "packages": {"torch": torch.__version__}}


def toolchain(config: Any) -> dict[str, str]:
    return {}
