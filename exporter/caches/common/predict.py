"""Weights with which stored values are continued to another timestep: plain floats, exact for polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence


def lagrange_weights(t: float, nodes: Sequence[float]) -> tuple[float, ...]:
    """The weight of each node's value in the value at `t` of the polynomial through all `nodes`.

    Lagrange's form: one node gives (1.0,), reuse; two a line, three a parabola. The nodes need not be equally far apart,
    unlike Taylor steps by index, and the weights sum to 1. Raises ZeroDivisionError where two nodes are equal.
    """
    return tuple(
        math.prod((t - other) / (node - other) for j, other in enumerate(nodes) if j != i)
        for i, node in enumerate(nodes)
    )
