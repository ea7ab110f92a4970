"""The step's graph for many evaluations at once: it reads its weights once for all of them.

    before  step(timestep [B], ...):     m = linear(silu(time(timestep)), W)      [B, D]
    after   step(timestep [E, B], ...):  m = linear(silu(time(timestep)), W)      [E, B, D]

torch.vmap does it, operator by operator, so each evaluation is computed as it would be alone. Layers stay one operator each:
torch's own rule would write them as a product and a sum, which in 16 bits rounds twice.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...runtime.errors import ExportError, first_line
from ..capture.capture import tensor_specs
from ..lower.w8a8 import map_rows
from ..passes.captured_graph import CapturedGraph, output_nodes
from ..passes.prune import prune_dead_code
from ..private_torch import fake_tensor_mode, flatten_tree, operator_overload
from .values import STEP_INPUT

LINEAR = torch.ops.aten.linear.default


@torch.library.custom_op("prebake::linear_rows", mutates_args=())
def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`aten.linear`, while a graph is traced."""
    return torch.nn.functional.linear(x, weight, bias)


@linear_rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


map_rows(linear_rows)


def stack_evaluations(step: CapturedGraph, evaluations: int) -> CapturedGraph:
    """The graph for that many. Raises ExportError where an operator of it cannot be mapped."""
    constants = step.constants()
    gm = swap_operators(fx.GraphModule(step.gm, copy.deepcopy(step.gm.graph)), LINEAR, operator_overload(linear_rows))
    mapped = tuple(0 if spec.name == STEP_INPUT else None for spec in step.inputs)
    args = tuple(t if dim is None else torch.stack([t] * evaluations) for t, dim in zip(step.args, mapped, strict=True))

    def compute(weights: list[Tensor], given: list[Tensor]) -> Any:
        named = dict(zip(constants, weights, strict=True))
        return torch.vmap(lambda *flat: torch.func.functional_call(gm, named, flat), in_dims=mapped)(*given)

    try:
        # a mode that takes real constants too, which AOTInductor finds in the graph and goes on with
        with torch.no_grad(), fake_tensor_mode() as fake:
            weights, given = ([fake.from_tensor(t) for t in tensors] for tensors in (constants.values(), args))
            traced = make_fx(compute)(weights, given)
    except Exception as e:
        raise ExportError(
            f"graph {step.name!r}: it could not be made for {evaluations} evaluations at once ({type(e).__name__}: {first_line(e)}); "
            "set compile.hoist=false"
        ) from e
    stacked = bind_constants(traced, constants)
    gm = prune_dead_code(swap_operators(stacked, operator_overload(linear_rows), LINEAR))
    results = [n.meta["val"] for n in output_nodes(gm)]
    assert all(t.is_contiguous() for t in results)
    names = tuple(s.name for s in step.inputs), tuple(s.name for s in step.outputs)
    return replace(step, gm=gm, args=args, inputs=tensor_specs(names[0], args), outputs=tensor_specs(names[1], results))


def swap_operators(gm: fx.GraphModule, old: Any, new: Any) -> fx.GraphModule:
    """`gm` with `new` called in the place of `old`, by position, its bias said."""
    for node in gm.graph.find_nodes(op="call_function", target=old):
        node.target = new
        node.args = (*node.args, *(node.kwargs.get("bias"),) * (3 - len(node.args)))
        node.kwargs = {}
    gm.recompile()
    return gm


def bind_constants(traced: fx.GraphModule, constants: dict[str, Tensor]) -> fx.GraphModule:
    """The traced graph, whose first inputs are the constants, with these as its own, and a flat tuple as what it returns."""
    graph, nodes = fx.Graph(), {}
    unbound = iter(constants)
    for node in traced.graph.nodes:
        if node.op == "output":
            graph.output(tuple(nodes[n] for n in flatten_tree(node.args) if isinstance(n, fx.Node)))
        elif node.op == "placeholder" and (name := next(unbound, None)):
            nodes[node] = graph.get_attr(name)
            nodes[node].meta = dict(node.meta)
        else:
            nodes[node] = graph.node_copy(node, lambda n: nodes[n])
    return fx.GraphModule(dict(constants), graph)
