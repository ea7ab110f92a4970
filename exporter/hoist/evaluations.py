"""The step's graph for many evaluations at once: it reads its weights once for all of them.

    before  step(timestep [B], ...):   m = linear(silu(time(timestep)), W)      [B, D]
    after   step(timestep [E, B], ...): m = linear(silu(time(timestep)), W)     [E, B, D]

torch.vmap does it, operator by operator, so each evaluation is computed as it would be alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ..capture.capture import capture_graph
from ..passes.captured_graph import CapturedGraph
from .values import STEP_INPUT

INNER = "evaluation"


class Evaluations(nn.Module):
    """A step's graph on E timesteps; its other inputs are those of all."""

    def __init__(self, step: CapturedGraph) -> None:
        super().__init__()
        self.add_module(INNER, step.gm)
        self.mapped = tuple(0 if spec.name == STEP_INPUT else None for spec in step.inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.vmap(self.get_submodule(INNER), in_dims=self.mapped)(*tensors)


def stack_evaluations(step: CapturedGraph, evaluations: int) -> CapturedGraph:
    """The graph for that many. Raises ExportError where an operator of it cannot be mapped."""
    module = Evaluations(step)
    args = tuple(
        t if mapped is None else torch.stack([t] * evaluations)
        for t, mapped in zip(step.args, module.mapped, strict=True)
    )
    names = tuple(s.name for s in step.inputs), tuple(s.name for s in step.outputs)
    return strip_prefix(capture_graph(step.name, module, args, *names), f"{INNER}.")


def strip_prefix(graph: CapturedGraph, prefix: str) -> CapturedGraph:
    """The graph with its constants under the names that they had in the module inside."""
    tensors = {name.removeprefix(prefix): t for name, t in graph.constants().items()}
    for node in graph.gm.graph.find_nodes(op="get_attr"):
        node.target = str(node.target).removeprefix(prefix)
    return replace(graph, gm=fx.GraphModule(tensors, graph.gm.graph))
