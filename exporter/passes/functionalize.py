"""In-place operators become functional ones, so that dead code can be told from side effects.

    before  c = int_mm(a, b); sub_(c, comp);  y = c.to(float)
    after   c = int_mm(a, b); d = sub(c, comp); y = d.to(float)

torch.export's own functionalization (`run_decompositions`) traces the whole graph a second time, which took two thirds
of capturing; models mutate nothing but fresh results of arithmetic, and this handles exactly that.
"""

from __future__ import annotations

import torch
from torch import fx

from ..private_torch import (
    HigherOrderOperator,
    OpOverload,
    have_equal_shapes,
    operator_family,
    operator_schema,
    overload_name,
)


def functionalize_graph(gm: fx.GraphModule) -> bool:
    """Rewrites `gm` in place; False, and `gm` as it was, if something mutates in a way that is not understood here."""
    mutating = [n for n in gm.graph.nodes if n.op == "call_function" and is_mutating(n)]
    if any(not is_understood(n) for n in mutating):
        return False
    if not mutating:
        return True
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in mutating:
        target = node.args[0]
        node.target = functional_form(node.target)
        target.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
    gm.graph.lint()
    gm.recompile()
    return True


def is_mutating(node: fx.Node) -> bool:
    """Writes to an argument, or is a higher-order operator, whose body could."""
    if isinstance(node.target, OpOverload):
        return operator_schema(node.target).is_mutable
    return isinstance(node.target, HigherOrderOperator)


def is_understood(node: fx.Node) -> bool:
    """`op_(x, ...)` where a functional `op` exists and nobody else can see the memory of x."""
    target = node.args[0] if node.args else None
    if (
        not isinstance(node.target, OpOverload)
        or functional_form(node.target) is None
        or not isinstance(target, fx.Node)
    ):
        return False
    before, after = target.meta["val"], node.meta["val"]
    return (
        before.dtype == after.dtype
        and have_equal_shapes(before, after)
        and has_private_memory(target)
        and not any(is_view(user) for user in target.users)
    )


def functional_form(op: OpOverload) -> OpOverload | None:
    """`aten.sub.Tensor` for `aten.sub_.Tensor`, or None."""
    name = operator_schema(op).name.removeprefix("aten::")
    packet = (
        getattr(torch.ops.aten, name.removesuffix("_"), None)
        if name.endswith("_") and not name.endswith("__")
        else None
    )
    return getattr(packet, overload_name(op), None) if packet is not None else None


def has_private_memory(node: fx.Node) -> bool:
    """The node's value is an operator's fresh result, or a view of one that nothing else reads (`(a * b).reshape(...)`)."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    if not is_view(node):
        return True
    base = node.args[0]
    return isinstance(base, fx.Node) and len(base.users) == 1 and has_private_memory(base)


def is_view(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument. `to` and `contiguous` may, so they count."""
    if not isinstance(node.target, OpOverload):
        return True
    returns_alias = (
        any(r.alias_info is not None for r in operator_schema(node.target).returns)
        and not operator_schema(node.target).is_mutable
    )
    return returns_alias or operator_family(node.target) in (
        "reshape",
        "contiguous",
        "to",
        "flatten",
        "type_as",
        "expand_as",
    )
