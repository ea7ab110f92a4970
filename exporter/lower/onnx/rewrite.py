"""Passes to a graph in the words that ONNX has, for the backends that go by `onnx/graph.py`.

    before  y = linear(x, weight, bias);  a, b = chunk(y, 2, -1);          z = cat([half, float])
    after   y = x @ weight_t + bias;      a, b = y[..., :n], y[..., n:];   z = cat([half.to(float), float])

ONNX multiplies by [in, out], has no operator that promotes, and its lists of tensors are a type that few compilers take.
Operators that torch.onnx knows by another one only are that one: without them it need not trace the graph again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from ...passes.captured_graph import CapturedGraph, GraphPass, run_passes
from ...passes.derived_weights import DerivedWeights
from ...passes.prune import prune_dead_code

aten = torch.ops.aten


def list_passes(*, transpose: bool = True) -> tuple[GraphPass, ...]:
    """The passes over all graphs of an artifact. With `transpose` Linears' weights are laid as [in, out] once and for all,
    here, and variants go on sharing them; else each Linear stays one."""
    return (
        *((partial(transpose_linears, weights=DerivedWeights()),) if transpose else ()),
        unfold_operators,
        copy_shared_outputs,  # behind what takes operators away: an output may be another's then
        prune_dead_code,
    )


def rewrite_graph(graph: CapturedGraph, *, transpose: bool = True) -> CapturedGraph:
    """One graph alone in the words that ONNX has."""
    return run_passes(graph, list_passes(transpose=transpose))


def transpose_linears(gm: fx.GraphModule, weights: DerivedWeights) -> fx.GraphModule:
    """Every Linear of a stored weight as a product and a sum."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        unfold_linear(gm, node, weights)
    return gm


def unfold_operators(gm: fx.GraphModule) -> fx.GraphModule:
    """No lists of tensors, no mixed dtypes in a `cat`, and no operator that torch.onnx knows by another one only."""
    for node in list(gm.graph.nodes):
        handler = HANDLERS.get(node.target) or HANDLERS.get(operator_packet(node))
        if node.op == "call_function" and handler:
            handler(gm, node)
    return gm


def copy_shared_outputs(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy for each output that is another output too, or an input or a constant: in ONNX a value has one name."""
    (output,) = gm.graph.find_nodes(op="output")
    seen: set[fx.Node] = set()

    def own(value: fx.Node) -> fx.Node:
        if value not in seen and value.op == "call_function":
            seen.add(value)
            return value
        with gm.graph.inserting_before(output):
            fresh = gm.graph.call_function(aten.clone.default, (value,))
        fresh.meta["val"] = value.meta.get("val")
        return fresh

    output.args = (tuple(own(value) for value in output.args[0]),)
    return gm


def unfold_linear(gm: fx.GraphModule, node: fx.Node, weights: DerivedWeights) -> None:
    """A Linear of a stored weight as a product and a sum."""
    x, weight, *bias = node.args
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return
    name = weights.store(gm, str(weight.target), "t", lambda stored: stored.detach().t().contiguous())
    with gm.graph.inserting_before(node):
        product = gm.graph.call_function(aten.matmul.default, (x, gm.graph.get_attr(name)))
        product.meta["val"] = node.meta["val"]
        if bias and bias[0] is not None:
            product = gm.graph.call_function(aten.add.Tensor, (product, bias[0]))
            product.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(product)


def unfold_split(gm: fx.GraphModule, node: fx.Node) -> None:
    """A split as a slice, and `unbind` as a selection, for each part that is read."""
    if any(user.target is not operator.getitem for user in node.users):
        return
    x: Any = node.args[0]
    selects = node.target is aten.unbind.int
    dim = node.kwargs.get("dim", node.args[(1 if selects else 2)] if len(node.args) > (1 if selects else 2) else 0)
    sizes = [1 if selects else part.shape[dim] for part in node.meta["val"]]
    for user in list(node.users):
        i: Any = user.args[1]
        begin = sum(sizes[:i])
        with gm.graph.inserting_before(user):
            if selects:
                part = gm.graph.call_function(aten.select.int, (x, dim, begin))
            else:
                part = gm.graph.call_function(aten.slice.Tensor, (x, dim, begin, begin + sizes[i]))
        part.meta["val"] = user.meta["val"]
        user.replace_all_uses_with(part)


def cast_parts(gm: fx.GraphModule, node: fx.Node) -> None:
    """Casts what is joined to the dtype of the result, where it is another."""
    dtype = node.meta["val"].dtype
    parts: Any = node.args[0]
    node.args = ([cast_before(gm, node, part, dtype) for part in parts], *node.args[1:])


def replace_cast(gm: fx.GraphModule, node: fx.Node) -> None:
    """A cast by `to`, whatever its overload, as the one that torch.onnx knows."""
    x: Any = node.args[0]
    node.replace_all_uses_with(cast_before(gm, node, x, node.meta["val"].dtype))


def replace_reshape(gm: fx.GraphModule, node: fx.Node) -> None:
    """A flatten or an unflatten as a reshape."""
    node.target, node.kwargs = aten.reshape.default, {}
    node.args = (node.args[0], list(node.meta["val"].shape))


def drop_dropout(gm: fx.GraphModule, node: fx.Node) -> None:
    """No dropout, outside of training."""
    x: Any = node.args[0]
    if not node.args[2]:
        node.replace_all_uses_with(x)


def drop_squeeze(gm: fx.GraphModule, node: fx.Node) -> None:
    """No squeeze of what is not 1 long, which ONNX refuses."""
    x: Any = node.args[0]
    if x.meta["val"].shape == node.meta["val"].shape:
        node.replace_all_uses_with(x)


HANDLERS: Mapping[Any, Callable[[fx.GraphModule, fx.Node], None]] = {
    aten.chunk.default: unfold_split,
    aten.split.Tensor: unfold_split,
    aten.split_with_sizes.default: unfold_split,
    aten.unbind.int: unfold_split,
    aten.cat.default: cast_parts,
    aten.concat.default: cast_parts,
    aten.stack.default: cast_parts,
    aten.to: replace_cast,
    aten.flatten: replace_reshape,
    aten.unflatten: replace_reshape,
    aten.dropout.default: drop_dropout,
    aten.squeeze.dim: drop_squeeze,
}
"""Operator, or all its overloads -> what unfolds a call of it."""


def operator_packet(node: fx.Node) -> Any:
    """The operator, whatever its overload."""
    return getattr(node.target, "overloadpacket", None)


def cast_before(gm: fx.GraphModule, before: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """x itself where it is of this dtype, and otherwise a copy, which is written before another node."""
    if x.meta["val"].dtype == dtype:
        return x
    with gm.graph.inserting_before(before):
        fresh = gm.graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    fresh.meta["val"] = x.meta["val"].to(dtype)
    return fresh
