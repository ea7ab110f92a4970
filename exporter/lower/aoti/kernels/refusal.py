"""Refusals: why a kernel does not take a place in a graph that it is for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from .....runtime.manifest import KernelRefusal


@dataclass(frozen=True)
class Refusal:
    """What a match function returns in place of a match, where all but `reason` fits; None there means: another thing."""

    kernel: str
    reason: str


def group_refusals(refused: Iterable[tuple[fx.Node, Refusal]]) -> tuple[KernelRefusal, ...]:
    """One entry for each kernel and reason, with how many places it stands for and the first of them, in graph order."""
    places: dict[Refusal, list[fx.Node]] = {}
    for node, refusal in refused:
        places.setdefault(refusal, []).append(node)
    return tuple(
        KernelRefusal(kernel=r.kernel, reason=r.reason, places=len(nodes), first=name_place(nodes[0]))
        for r, nodes in places.items()
    )


def name_place(node: fx.Node) -> str:
    """The path of the module that the node was captured in, or where that is unknown the node's own name."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(stack.values()) if path), node.name)
