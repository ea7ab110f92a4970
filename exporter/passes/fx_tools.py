"""Small tools for rewriting captured graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..private_torch import operator_overload

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten._to_copy.default)


def node_arguments(node: fx.Node, names: tuple[str, ...]) -> tuple[Any, ...]:
    """A call's arguments by position, None for those that are left out."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return tuple(given.get(name) for name in names)


def only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def make_contiguous(gm: fx.GraphModule, x: fx.Node, order: torch.memory_format = torch.contiguous_format) -> fx.Node:
    """x where it lies in order, and otherwise a copy."""
    if x.meta["val"].is_contiguous(memory_format=order):
        return x
    fresh = gm.graph.call_function(aten.clone.default, (x,), {"memory_format": order})
    fresh.meta["val"] = x.meta["val"].contiguous(memory_format=order)
    return fresh


def replace_call(gm: fx.GraphModule, node: fx.Node, operator: Any, args: tuple[Any, ...]) -> None:
    fresh = gm.graph.call_function(operator_overload(operator), args)
    fresh.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(fresh)


def store_buffer(gm: fx.GraphModule, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    gm.get_submodule(path).register_buffer(leaf, value)
