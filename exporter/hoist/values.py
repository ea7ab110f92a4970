"""The values that a denoiser's variants compute before they look at the latents, each once, whoever computes it.

In: the captured variants. Out: a `ValueTable`. Two nodes are one value where they call one operator with equal arguments, down to
the inputs' names and the constants' memory, so that branches of guidance and variants share what they have in common.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.captured_graph import CapturedGraph
from ..passes.fold import MAX_TABLE_BYTES, find_tensor, is_random


class Level(IntEnum):
    """What a value depends on, each level on those before too: weights alone, what is equal at every step, the step, and what the
    loop makes (latents, stored values and their coefficients, guidance, which a callback may change)."""

    CONSTANT, PROMPT, STEP, LOOP = range(4)


STEP_INPUT = "timestep"
LOOP_INPUTS = ("hidden_states", "coefficients", "guidance_scale", "guidance_rescale", "img_ids")
"""Beside the stored values, whose names have an `@`. Token positions are there in a range alone, and what is made of them follows the size,
as nothing does that is passed to the loop."""


def input_level(name: str) -> Level:
    """The level of a denoiser's input."""
    if name == STEP_INPUT:
        return Level.STEP
    return Level.LOOP if name in LOOP_INPUTS or "@" in name else Level.PROMPT


@dataclass(frozen=True)
class Value:
    """A value below Level.LOOP: the first node that computes it, the graph that this is of, and the values that it is made of, by their
    place in the table."""

    node: fx.Node
    graph: CapturedGraph
    level: Level
    arguments: tuple[int, ...]

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that tracing saw, without its numbers; None of a value that is several."""
        seen = self.node.meta.get("val")
        return seen if isinstance(seen, Tensor) else None

    def constant(self) -> Tensor:
        """The tensor that a node `get_attr` reads."""
        return find_tensor(self.graph.gm, str(self.node.target))


class ValueTable:
    """`values` in an order in which they can be computed, `inputs` the graphs' inputs among them by name; `numbers[graph]` is node ->
    place in `values`, and `readers` are the places of what the loop reads."""

    def __init__(self, graphs: Iterable[CapturedGraph]) -> None:
        self.values: list[Value] = []
        self.inputs: dict[str, int] = {}
        self.numbers: dict[str, dict[fx.Node, int]] = {}
        self.readers: set[int] = set()
        self._places: dict[Any, int] = {}
        self._tables: list[tuple[Tensor, int]] = []
        for graph in graphs:
            self.numbers[graph.name] = self._add_graph(graph)

    def _add_graph(self, graph: CapturedGraph) -> dict[fx.Node, int]:
        numbers: dict[fx.Node, int] = {}
        names = iter(graph.inputs)
        for node in graph.gm.graph.nodes:
            made_of = tuple(numbers.get(n, -1) for n in node.all_input_nodes)
            if node.op == "placeholder":
                name = next(names).name
                if (level := input_level(name)) < Level.LOOP:
                    numbers[node] = self.inputs[name] = self._add(("input", name), Value(node, graph, level, ()))
            elif node.op == "get_attr":
                numbers[node] = self._add_constant(Value(node, graph, Level.CONSTANT, ()))
            elif node.op != "call_function" or -1 in made_of or is_random(node):
                self.readers |= {number for number in made_of if number >= 0}
            else:
                level = max((self.values[number].level for number in made_of), default=Level.CONSTANT)
                said = fx.map_arg((node.args, node.kwargs), lambda n: f"<value {numbers[n]}>")
                numbers[node] = self._add((node.target, repr(said)), Value(node, graph, level, made_of))
        return numbers

    def _add(self, key: Any, value: Value) -> int:
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]

    def _add_constant(self, value: Value) -> int:
        """One of the same memory, or a small one of equal numbers: each variant folds tables of its own."""
        tensor = value.constant()
        key = ("constant", tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in self._places and not isinstance(tensor, torch.nn.Parameter) and tensor.nbytes <= MAX_TABLE_BYTES:
            for other, place in self._tables:
                if are_equal_tensors(tensor, other):
                    self._places[key] = place
                    return place
            self._tables.append((tensor, len(self.values)))
        return self._add(key, value)


def are_equal_tensors(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
