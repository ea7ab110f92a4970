"""Batches: the pictures of a call in groups that go through the loop together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..replay import Tensors


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
