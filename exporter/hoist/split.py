"""The graphs that hoisting leaves: one of chosen values, and a variant's that takes them as inputs.

before  full(latents, text):   k = text @ Wk;   ... attention(q, k)
after   prologue(text):        k = text @ Wk
        full(latents, text, prologue:0):         ... attention(q, prologue:0)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from ...runtime.manifest import TensorSpec
from ..passes.captured_graph import CapturedGraph
from ..passes.prune import prune_dead_code
from .values import Value, ValueTable


def build_graph(
    name: str, table: ValueTable, outputs: Mapping[int, TensorSpec], passed: Mapping[int, TensorSpec]
) -> CapturedGraph:
    """The graph that computes the values `outputs`, of inputs of the denoiser and of values that others have computed, `passed`.
    Constants keep the names that they have in the graph that a value comes from."""
    needed = find_needed(table, outputs, passed)
    inputs = {
        **{place: input_spec(table.values[place]) for place in table.inputs.values() if place in needed},
        **{place: spec for place, spec in passed.items() if place in needed},
    }
    graph, nodes, tensors = fx.Graph(), {}, {}
    for place, spec in inputs.items():
        nodes[place] = graph.placeholder(spec.name.replace(":", "_"))
        nodes[place].meta = dict(table.values[place].node.meta)
    for place in sorted(needed - inputs.keys()):
        value = table.values[place]
        if value.node.op == "get_attr":
            nodes[place] = graph.get_attr(name_constant(tensors, str(value.node.target), value.constant()))
        else:
            node, made_of = value.node, table.numbers[value.graph.name]
            nodes[place] = graph.node_copy(node, lambda n, made_of=made_of: nodes[made_of[n]])
        nodes[place].meta = dict(value.node.meta)
    graph.output(tuple(nodes[place] for place in outputs))
    gm = fx.GraphModule(tensors, graph)
    args = tuple(example_tensor(table.values[place]) for place in inputs)
    return CapturedGraph(name, gm, args, tuple(inputs.values()), tuple(outputs.values()))


def find_needed(table: ValueTable, outputs: Mapping[int, TensorSpec], passed: Mapping[int, TensorSpec]) -> set[int]:
    """The places of all that `outputs` are made of, down to constants, inputs and what is passed."""
    needed: set[int] = set()
    missing = list(outputs)
    while missing:
        place = missing.pop()
        if place not in needed:
            needed.add(place)
            missing += () if place in passed else table.values[place].arguments
    return needed


def name_constant(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> str:
    """The name under which `tensors` has it now: variants have folded values of one name and of different numbers."""
    found, n = name, 0
    while found in tensors and tensors[found] is not tensor:
        n += 1
        found = f"{name}_{n}"
    tensors[found] = tensor
    return found


def input_spec(value: Value) -> TensorSpec:
    """An input of the denoiser, as its graph has it."""
    placeholders = value.graph.gm.graph.find_nodes(op="placeholder")
    return next(s for s, n in zip(value.graph.inputs, placeholders, strict=True) if n is value.node)


def example_tensor(value: Value) -> Tensor:
    """Of an input its example; of a value zeros of its shape."""
    if value.node.op == "placeholder":
        spec = input_spec(value)
        return value.graph.args[value.graph.inputs.index(spec)]
    seen = value.tensor
    assert seen is not None
    return torch.zeros(tuple(seen.shape), dtype=seen.dtype)


def pass_values(graph: CapturedGraph, table: ValueTable, passed: Mapping[int, TensorSpec]) -> CapturedGraph:
    """The variant with the values that it reads as inputs, behind its own, and without what only they needed. Its own inputs all
    stay: who calls it gives them, read or not."""
    fewer = copy.deepcopy(graph.gm.graph)
    fewer.set_codegen(CodeGen())  # flat tensors in and out; as traced, a graph takes its own number of inputs
    gm = fx.GraphModule(graph.gm, fewer)
    numbers = table.numbers[graph.name]
    fresh: dict[int, fx.Node] = {}
    *_, last = gm.graph.find_nodes(op="placeholder")
    for old, node in zip(graph.gm.graph.nodes, list(gm.graph.nodes), strict=True):
        place = numbers.get(old)
        if place is None or place not in passed:
            continue
        if place not in fresh:
            with gm.graph.inserting_after(last):
                fresh[place] = last = gm.graph.placeholder(passed[place].name.replace(":", "_"))
            last.meta = dict(old.meta)
        node.replace_all_uses_with(fresh[place])
    if not fresh:
        return graph
    gm = prune_dead_code(gm)
    kept = {place: node for place, node in fresh.items() if node.users}
    for place in fresh.keys() - kept.keys():
        gm.graph.erase_node(fresh[place])
    gm.recompile()
    specs = tuple(passed[place] for place in kept)
    args = tuple(example_tensor(table.values[place]) for place in kept)
    return replace(graph, gm=gm, inputs=(*graph.inputs, *specs), args=(*graph.args, *args))
