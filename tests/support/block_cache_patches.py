"""Block-level caches written a second time, as patches of an eager model's blocks, and which blocks run in either."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from prebake.exporter.caches import Schedule
from prebake.exporter.sites.layout import Layout
from support import cache_peers as peers

STREAMS = {
    "flux": ("encoder_hidden_states", "hidden_states"),
    "cogvideox": ("hidden_states", "encoder_hidden_states"),
    "sd3": ("encoder_hidden_states", "hidden_states"),
    "pixart": ("hidden_states",),
}
"""The argument that each output of a model's blocks continues, by hand."""


def stack(model: nn.Module) -> list[nn.Module]:
    """A DiT's blocks in the order in which it runs them."""
    lists = (getattr(model, name, ()) for name in ("transformer_blocks", "single_transformer_blocks"))
    return [block for blocks in lists for block in blocks]


def patch(module: nn.Module, wrapped: Callable[..., Any]) -> None:
    """`wrapped(forward, *args, **kwargs)` in place of the module's forward."""
    forward = module.forward
    module.forward = functools.wraps(forward)(functools.partial(wrapped, forward))


class Skipped:
    """Blocks that are not called at some evaluations: what they added before is predicted, in float64, by Newton's
    divided differences through the last `order` + 1 residuals."""

    def __init__(self, streams: tuple[str, ...], computes: Sequence[bool], order: int = 0) -> None:
        self.streams, self.computes, self.order = streams, computes, order
        self.points: list[tuple[float, dict[str, Tensor]]] = []
        self.head: dict[str, Tensor] = {}

    def __call__(self, blocks: Sequence[nn.Module], clock: peers.Clock) -> None:
        first, last = blocks[0], blocks[-1]
        for block in blocks:
            patch(block, functools.partial(self.forward, clock, block is first, block is last))

    def forward(self, clock, is_first, is_last, forward, *args, **kwargs):
        given = inspect.signature(forward).bind(*args, **kwargs).arguments
        if is_first:
            self.head = {s: given[s] for s in self.streams}
        if self.computes[clock.e]:
            output = forward(*args, **kwargs)
            if is_last:
                self.keep(clock(), output if isinstance(output, tuple) else (output,))
            return output
        values = [given[s] for s in self.streams]
        if is_last:
            known = self.points[-1][1]
            values = [given[s] + self.predicted(s, clock()) if s in known else None for s in self.streams]
        return tuple(values) if len(values) > 1 else values[0]

    def keep(self, t: float, outputs: tuple[Any, ...]) -> None:
        pairs = zip(self.streams, outputs, strict=True)
        self.points.append((t, {s: o - self.head[s] for s, o in pairs if o is not None}))

    def predicted(self, stream: str, t: float) -> Tensor:
        points = self.points[-1 - self.order :]
        return newton([p[0] for p in points], [p[1][stream] for p in points], t)


def newton(times: Sequence[float], values: Sequence[Tensor], t: float) -> Tensor:
    """The interpolating polynomial's value at t."""
    table, total, product = [v.double() for v in values], values[0].double() * 0, 1.0
    for k in range(len(times)):
        total = total + product * table[0]
        product *= t - times[k]
        table = [(b - a) / (times[i + k + 1] - times[i]) for i, (a, b) in enumerate(itertools.pairwise(table))]
    return total.to(values[0].dtype)


def blocks_run(layout: Layout, schedule: Schedule, branch: str) -> list[set[str]]:
    """The blocks of one branch that each evaluation of our schedule computes: those in no combined site."""
    run = []
    for decision in schedule.decisions:
        replaced = {p for m in schedule.marks if decision.actions.get(m.name) == "combine" for p in m.modules}
        run.append({p.name for p in layout.blocks(branch) if "" not in replaced and p.path not in replaced})
    return run


def blocks_ran(layout: Layout, run: peers.Run) -> list[set[str]]:
    """The blocks whose own forwards ran in the peer, evaluation by evaluation."""
    names = {p.name for p in layout.blocks(layout.branches[0])}
    return [ran & names for ran in run.ran]
