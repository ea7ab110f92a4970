"""Values that depend on constants alone are computed once, at export.

    before  comp = sum(weight, 0) * 128;  y = int_mm(x, weight) - comp      (every layer, every step)
    after   comp = folded_0;              y = int_mm(x, weight) - comp

Two kinds are worth it: tables made from buffers or from nothing (rotary cosines from token positions, masks), and
reductions of weights (the column sums with which torchao's u8s8 path corrects its product). What would store a weight
a second time in another shape (its transpose, its float copy) is left in the graph.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from ..private_torch import OpOverload

MIN_SHRINK_FACTOR = 8
"""A value made from weights is folded only if it is at least this many times smaller than they are."""
MAX_TABLE_BYTES = 64 << 20
"""A value made without weights is folded up to this size."""


def fold_constants(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with foldable constant subgraphs replaced by buffers `folded_0`, `folded_1`, ..."""
    sources = constant_sources(gm)
    folded: dict[str, torch.Tensor] = {}
    for node in list(gm.graph.nodes):
        if (
            node.op != "call_function"
            or node not in sources
            or not is_on_frontier(node, sources)
            or not is_worth_folding(gm, node, sources[node])
        ):
            continue
        name = store_constant(gm, folded, evaluate_node(gm, node).contiguous().clone())
        with gm.graph.inserting_before(node):
            constant = gm.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    if folded:
        gm.graph.lint()
        gm.recompile()
    return gm


def store_constant(gm: fx.GraphModule, folded: dict[str, torch.Tensor], value: torch.Tensor) -> str:
    """The buffer that holds `value`: an equal one if there is one (every block folds the same rotary table)."""
    for name, other in folded.items():
        if other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value):
            return name
    name = next(n for n in (f"folded_{i}" for i in itertools.count(len(folded))) if not hasattr(gm, n))
    gm.register_buffer(name, value)
    folded[name] = value
    return name


def constant_sources(gm: fx.GraphModule) -> dict[fx.Node, frozenset[str]]:
    """For each node that depends on no input: the names of the parameters and buffers it is made from."""
    sources: dict[fx.Node, frozenset[str]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            sources[node] = frozenset([str(node.target)])
        elif node.op == "call_function" and all(n in sources for n in node.all_input_nodes) and not is_random(node):
            sources[node] = frozenset().union(*(sources[n] for n in node.all_input_nodes))
    return sources


def is_random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def is_on_frontier(node: fx.Node, sources) -> bool:
    """Some user of the node needs more than constants, so the value must exist at run time; and it is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor) and any(user not in sources for user in node.users)


def is_worth_folding(gm: fx.GraphModule, node: fx.Node, names: frozenset[str]) -> bool:
    parameters = {n for n, _ in gm.named_parameters(remove_duplicate=False)}
    size = node.meta["val"].nbytes
    weights = [find_tensor(gm, n).nbytes for n in names if n in parameters]
    return size * MIN_SHRINK_FACTOR <= sum(weights) if weights else size <= MAX_TABLE_BYTES


def find_tensor(gm: fx.GraphModule, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(gm.get_submodule(path), leaf)


def evaluate_node(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The node's value, computed from the module's tensors."""
    values: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in values:
            if n.op == "get_attr":
                values[n] = find_tensor(gm, str(n.target))
            else:
                args, kwargs = fx.map_arg((n.args, n.kwargs), value)
                target: Any = n.target
                values[n] = target(*args, **kwargs)
        return values[n]

    result = value(node)
    assert isinstance(result, torch.Tensor)
    return result.detach()
