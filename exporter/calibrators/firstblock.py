"""FirstBlockCache's online rule, as diffusers applies it (hooks/first_block_cache.py, 0.42.1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...runtime.errors import ExportError
from ..caches.firstblock import FirstBlockCache
from ..plan.sampler import SchedulerTable
from ..sites.layout import Layout
from ..sites.marks import Mark

IMAGE_STREAM = "hidden_states"
"""The stream that is compared."""


def probes(cache: FirstBlockCache, layout: Layout) -> tuple[Mark, ...]:
    """The sites of what the first block adds to the hidden states, in each branch."""
    return tuple(layout.residual(branch, 0, 1) for branch in layout.branches)


class OnlineRule:
    """A branch computes where its first block's residual moved by more than `threshold` since it last computed, as a share
    of that earlier residual's size (means of absolute values); and at its first evaluation."""

    rounds = 1

    def __init__(self, cache: FirstBlockCache, layout: Layout, table: SchedulerTable) -> None:
        self.threshold = cache.threshold
        self.signals = {
            b: find_hidden_tensor(mark, cache.method)
            for b, mark in zip(layout.branches, probes(cache, layout), strict=True)
        }
        self.computed: dict[str, Tensor] = {}

    def decide(self, e: int, timestep: float, signals: Mapping[str, Tensor]) -> Mapping[str, bool]:
        return {branch: self.computes(branch, signals[name]) for branch, name in self.signals.items()}

    def computes(self, branch: str, residual: Tensor) -> bool:
        before = self.computed.get(branch)
        if before is None:
            moved = True
        else:
            moved = ((residual - before).abs().mean() / before.abs().mean()).item() > self.threshold
        if moved:
            self.computed[branch] = residual
        return moved


def find_hidden_tensor(mark: Mark, method: str) -> str:
    """The tensor of a residual that belongs to the hidden states (FLUX's blocks return the text's states first).

    Raises ExportError where the blocks continue no stream of that name.
    """
    if IMAGE_STREAM not in mark.streams:
        raise ExportError(
            f"cache.method {method!r} looks at what blocks add to their input {IMAGE_STREAM!r}, and what {mark.modules[-1]} returns "
            f"continues {', '.join(filter(None, mark.streams)) or 'no input'}; take method 'mask'"
        )
    return mark.tensor(mark.streams.index(IMAGE_STREAM))
