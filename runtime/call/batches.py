"""Batches: the pictures of a call in groups that go through the loop together, by a graph for as many or by that for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..replay import Tensors

GraphCall = Callable[[Mapping[str, torch.Tensor]], Tensors]


def split_pictures(count: int, batches: Sequence[int]) -> list[slice]:
    """`count` pictures in their order, in groups as large as the graphs of `batches` allow: 7 by (1, 2, 4) as 4, 2 and 1."""
    groups, begin = [], 0
    while begin < count:
        size = max(batch for batch in batches if batch <= count - begin)
        groups.append(slice(begin, begin + size))
        begin += size
    return groups


def stack_conditions(conditions: Sequence[Tensors]) -> Tensors:
    """The denoiser's inputs [1, ...] of some pictures as those of one call [B, ...]."""
    if len(conditions) == 1:
        return conditions[0]
    return {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}


class RowByRow:
    """A denoiser's graph for one picture, called for each of `batch`: to the bit what each is alone. With `steps`, a graph of many
    evaluations at once: its timesteps, and what it gives, are [E, B n, ...]."""

    def __init__(self, graph: GraphCall, batch: int, *, steps: bool = False):
        self._graph, self._batch, self._steps = graph, batch, steps

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """Outputs [B n, ...] of inputs [B n, ...]: n rows of each belong to a picture."""
        rows = {name: t.chunk(self._batch, int(self._steps and name == "timestep")) for name, t in inputs.items()}
        made = [self._graph({name: row[i].contiguous() for name, row in rows.items()}) for i in range(self._batch)]
        return {name: torch.cat([one[name] for one in made], int(self._steps)) for name in made[0]}
