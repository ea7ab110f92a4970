"""A captured graph: what capture gives, passes change and backends lower."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...runtime.manifest import KernelRefusal, TensorSpec
from ...runtime.sizes.size_range import SizeRange

GraphPass = Callable[[fx.GraphModule], fx.GraphModule]
"""May edit what it is given, and returns it."""


@dataclass(frozen=True)
class CapturedGraph:
    """One graph ready to lower: `gm(*args)` returns a tuple. `inputs` and `outputs` name what is passed, in order. `sizes` are those that it
    is for, where it was traced for a range of them; `args` are then of the default one."""

    name: str
    gm: fx.GraphModule
    args: tuple[Tensor, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: SizeRange | None = None

    def constants(self) -> dict[str, Tensor]:
        """Every tensor the graph reads that is not an input, by the name AOTInductor will ask for."""
        held = dict(self.gm.named_parameters()) | dict(self.gm.named_buffers())
        used = {n.target for n in self.gm.graph.nodes if n.op == "get_attr"}
        return {name: t for name, t in held.items() if name in used}

    @property
    def kernels(self) -> dict[str, int]:
        """How often it calls which of prebake's own kernels: set by the pass that puts them in."""
        return self.gm.meta.get("kernels", {})

    @property
    def refusals(self) -> tuple[KernelRefusal, ...]:
        """Why kernels do not take places that they are for, from the same pass."""
        return self.gm.meta.get("refusals", ())

    def live_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that the pruned graph reads."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        return tuple(spec for spec, node in zip(self.inputs, placeholders, strict=True) if node.users)


def output_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values the graph returns, flat."""
    (output,) = gm.graph.find_nodes(op="output")
    flat: list[fx.Node] = []
    fx.map_arg(output.args, lambda n: flat.append(n))
    return flat


def find_embeddings(graph: CapturedGraph) -> dict[str, str]:
    """Input -> the constant whose rows its numbers are looked up in."""
    placeholders = graph.gm.graph.find_nodes(op="placeholder")
    inputs = {node: spec.name for spec, node in zip(graph.inputs, placeholders, strict=True)}
    found: dict[str, str] = {}
    for node in graph.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table, ids = (first_origin(argument) for argument in node.args[:2])
        if table.op == "get_attr" and ids in inputs:
            found[inputs[ids]] = str(table.target)
    return found


def first_origin(node: Any) -> fx.Node:
    """Where what is viewed or cast comes from: along each operator's first argument, as long as that is its only tensor."""
    while node.op == "call_function" and node.args and node.all_input_nodes == [node.args[0]]:
        node = node.args[0]
    return node


def run_passes(graph: CapturedGraph, passes: Sequence[GraphPass]) -> CapturedGraph:
    """The graph after these passes, one after the other; the graph that came in is left as it was."""
    if not passes:
        return graph
    gm = fx.GraphModule(graph.gm, copy.deepcopy(graph.gm.graph))
    for apply in passes:
        gm = apply(gm)
    return replace(graph, gm=gm)
