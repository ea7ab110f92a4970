"""Which values are passed to the loop: those that cost it the least memory traffic.

    text --linear--> k --view--> --transpose--> | attention        pass k, and leave the views in the loop
    timestep --sin--> --linear--> --linear--> m --chunk--> | mul    pass m

A value that is computed before the loop saves the weights and the arithmetic behind it at every evaluation but one, and costs the
reading of what is passed in its place. Both are counted in bytes, and the least sum is a minimum cut of a network, which
networkx finds. What is made for every step lies in memory for all of them: its bytes count as often as there are evaluations,
against weights that leave the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import networkx
from torch import fx

from ..cost.count import node_flops
from ..passes.functionalize import is_view
from .values import Level, Value, ValueTable

FLOPS_PER_BYTE = 128
"""Products in 16 bits that a machine makes while it reads a byte: some 50 on the CPUs tried, 200 on an H200."""
PASSING_BYTES = 64
"""What passing one more value costs, beside its bytes: of two cuts alike the one of fewer values is taken."""
CONSUMERS = "consumers"
ORIGIN = "origin"


def choose_values(table: ValueTable, level: Level, flops: Mapping[int, int], evaluations: int) -> tuple[int, ...]:
    """The places of the values of `level` that are computed before a loop of so many `evaluations`, and passed to what comes after.

    `flops` are `count_flops`. Only what is made by one of this level is passed: never an input in another form.
    """
    network, members = networkx.DiGraph(), [i for i, v in enumerate(table.values) if v.level == level]
    copies = evaluations if level == Level.STEP else 1
    network.add_nodes_from((ORIGIN, CONSUMERS))
    later = table.readers | {a for v in table.values if v.level > level for a in v.arguments}
    worked = find_descendants(table, level, frozenset(flops))
    for i in members:
        value = table.values[i]
        saved = saved_bytes(table, i, flops.get(i, 0)) * (evaluations - 1) // evaluations
        network.add_edge(ORIGIN, i, **({} if i in table.inputs.values() else {"capacity": saved}))
        network.add_edge(i, ("passed", i), **passing_capacity(value, copies, i in worked or not value.arguments))
        if i in later:
            network.add_edge(("passed", i), CONSUMERS)
        for a in {a for a in value.arguments if table.values[a].level == level}:
            network.add_edge(("passed", a), i)
            network.add_edge(i, a)  # what is computed before the loop has its arguments there
    _, (before, after) = networkx.minimum_cut(network, ORIGIN, CONSUMERS)
    return tuple(i for i in members if i in before and ("passed", i) in after and i in worked)


def passing_capacity(value: Value, copies: int, passable: bool) -> dict[str, int]:
    """Bytes that passing a value costs; no bound for one that cannot be: views, values that are several tensors, and those that do not
    lie in order."""
    tensor = value.tensor
    is_input = value.node.op == "placeholder"
    if not passable or tensor is None or not (is_input or (tensor.is_contiguous() and not is_view(value.node))):
        return {}
    return {"capacity": tensor.nbytes * copies + PASSING_BYTES}


def saved_bytes(table: ValueTable, i: int, flops: int) -> int:
    """What computing a value at every evaluation costs, as bytes: the weights that it reads, and its products. Those of a step are
    made for each evaluation all the same, so only their weights count."""
    value = table.values[i]
    read = sum(constant_bytes(table, value.arguments))
    if not flops:
        made = value.tensor.nbytes if value.tensor is not None else 0
        return min(read, made)
    return read + (flops // FLOPS_PER_BYTE if value.level == Level.PROMPT else 0)


def constant_bytes(table: ValueTable, places: Iterable[int]) -> list[int]:
    """Bytes of each constant that these values of Level.CONSTANT are made from."""
    found: set[int] = set()
    open_places = [i for i in places if table.values[i].level == Level.CONSTANT]
    while open_places:
        i = open_places.pop()
        if i not in found:
            found.add(i)
            open_places += table.values[i].arguments
    return [table.values[i].constant().nbytes for i in found if table.values[i].node.op == "get_attr"]


def count_flops(table: ValueTable) -> dict[int, int]:
    """Place -> FLOPs of the values that a matrix product, a convolution or an attention makes; equal calls are counted once."""
    known: dict[str, int] = {}
    found: dict[int, int] = {}
    for i, value in enumerate(table.values):
        if value.level > Level.CONSTANT and value.node.op == "call_function":
            shapes = fx.map_arg((value.node.args, value.node.kwargs), seen_tensor)
            key = f"{value.node.target} {shapes!r}"
            known.setdefault(key, -1)
            known[key] = node_flops(value.node) if known[key] < 0 else known[key]
            if known[key]:
                found[i] = known[key]
    return found


def seen_tensor(node: fx.Node) -> str:
    """An argument of a call, by what tracing saw of it."""
    return f"<{node.meta.get('val')}>"


def find_descendants(table: ValueTable, level: Level, origins: frozenset[int]) -> set[int]:
    """The values of `level` that are among `origins`, or made of one."""
    found: set[int] = set()
    for i, value in enumerate(table.values):
        if value.level == level and (i in origins or not found.isdisjoint(value.arguments)):
            found.add(i)
    return found
