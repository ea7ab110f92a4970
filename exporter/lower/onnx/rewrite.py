"""A captured graph in the words that ONNX has: `rewrite_graph` for the backends that go by `onnx_graph.py`.

    before  y = linear(x, weight, bias);  a, b = chunk(y, 2, -1);          z = cat([half, float])
    after   y = x @ weight_t + bias;      a, b = y[..., :n], y[..., n:];   z = cat([half.to(float), float])

ONNX multiplies by [in, out], has no operator that promotes, and its lists of tensors are a type that few compilers take.
Operators that torch.onnx knows by another one only are that one: without them it need not trace the graph again.
"""

from __future__ import annotations

import copy
import operator
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ...passes.captured_graph import CapturedGraph
from ...passes.fold import find_tensor
from ...passes.prune import prune_dead_code

aten = torch.ops.aten
SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
JOINS = (aten.cat.default, aten.concat.default, aten.stack.default)
RESHAPES = (aten.flatten, aten.unflatten)


class TransposedWeight:
    """A weight as [in, out], and the one it is made from, which lives as long, so that its address stays its own."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.tensor = weight.detach().t().contiguous()


TRANSPOSED_WEIGHTS: weakref.WeakValueDictionary[tuple[Any, ...], TransposedWeight] = weakref.WeakValueDictionary()
"""What the graphs that are alive have transposed: variants of a model share its weights, and go on sharing them."""


def rewrite_graph(graph: CapturedGraph, *, transpose: bool = True) -> CapturedGraph:
    """The graph without lists of tensors and without mixed dtypes in a `cat`, and with its Linears' weights as [in, out]
    where those are to be transposed once and for all, here."""
    gm = fx.GraphModule(graph.gm, copy.deepcopy(graph.gm.graph))
    kept: dict[str, TransposedWeight] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if transpose and node.target is aten.linear.default:
            unfold_linear(gm, node, kept)
        elif node.target in SPLITS:
            unfold_split(gm, node)
        elif node.target in JOINS:
            cast_parts(gm, node)
        elif operator_packet(node) is aten.to:
            node.replace_all_uses_with(cast_before(gm, node, node.args[0], node.meta["val"].dtype))
        elif operator_packet(node) in RESHAPES:
            node.target, node.kwargs = aten.reshape.default, {}
            node.args = (node.args[0], list(node.meta["val"].shape))
        elif node.target is aten.dropout.default and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.squeeze.dim and node.args[0].meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(node.args[0])  # ONNX refuses to squeeze what is not 1 long
    copy_shared_outputs(gm)
    gm.meta["transposed"] = tuple(kept.values())
    return replace(graph, gm=prune_dead_code(gm))


def copy_shared_outputs(gm: fx.GraphModule) -> None:
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


def unfold_linear(gm: fx.GraphModule, node: fx.Node, kept: dict[str, TransposedWeight]) -> None:
    """A Linear of a stored weight as a product and a sum."""
    x, weight, *bias = node.args
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return
    name = f"{weight.target}_t"
    if name not in kept:
        kept[name] = transpose_weight(find_tensor(gm, str(weight.target)))
        path, _, leaf = name.rpartition(".")
        gm.get_submodule(path).register_buffer(leaf, kept[name].tensor)
    with gm.graph.inserting_before(node):
        product = gm.graph.call_function(aten.matmul.default, (x, gm.graph.get_attr(name)))
        product.meta["val"] = node.meta["val"]
        if bias and bias[0] is not None:
            product = gm.graph.call_function(aten.add.Tensor, (product, bias[0]))
            product.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(product)


def transpose_weight(weight: Tensor) -> TransposedWeight:
    key = (weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride())
    made = TRANSPOSED_WEIGHTS.get(key)
    if made is None:
        made = TRANSPOSED_WEIGHTS[key] = TransposedWeight(weight)
    return made


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
