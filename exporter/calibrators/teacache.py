"""TeaCache's rule as it runs: one signal, its change since the evaluation before, a sum, a threshold.

`OnlineRule` is for `dynamic_replay`; `decide_by_timesteps` decides whole trajectories at once where the signal is the timestep's embedding,
by running the denoiser up to that module and no further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.errors import ExportError
from ..caches.teacache import ExactDecisions, TeaCache, marks
from ..plan.sampler import SchedulerTable
from ..sites.actions import flat_outputs, submodule
from ..sites.component import Component
from ..sites.layout import Layout
from ..sites.marks import REST_STREAM, Mark


def probes(cache: TeaCache, layout: Layout) -> tuple[Mark, ...]:
    """One for each branch: the first output of the module that gives the signal."""
    return tuple(mark_probe(cache, layout, branch) for branch in layout.branches)


def mark_probe(cache: TeaCache, layout: Layout, branch: str) -> Mark:
    first = layout.blocks(branch)[0]
    name = cache.module or ("time_embedding" if cache.exact else f"{first.name}.norm1")
    path = first.path.removesuffix(first.name) + name
    return Mark(f"{branch}/{name}" if branch else name, (path,), ("hidden_states", REST_STREAM), stored_streams=(0,))


@dataclass
class TeaCacheRule:
    """The rule for one branch of one trajectory of `evaluations`."""

    cache: TeaCache
    evaluations: int
    total: float = 0.0
    previous: Tensor | None = None

    def computes(self, e: int, signal: Tensor) -> bool:
        """Whether evaluation e computes; called once for each, in order."""
        before, self.previous = self.previous, signal
        if before is None or e < self.cache.ret_steps or e >= self.evaluations - self.cache.cutoff:
            self.total = 0.0
            return True
        self.total += evaluate_polynomial(self.cache.polynomial, relative_l1(signal, before))
        if self.total < self.cache.rel_l1_thresh:
            return False
        self.total = 0.0
        return True


def relative_l1(x: Tensor, before: Tensor) -> float:
    """mean|x - before| / mean|before|, in the tensors' own dtype."""
    return ((x - before).abs().mean() / before.abs().mean()).item()


def evaluate_polynomial(polynomial: tuple[float, ...], x: float) -> float:
    """The polynomial at x, highest power first."""
    value = 0.0
    for c in polynomial:
        value = value * x + c
    return value


class OnlineRule:
    """TeaCache's decisions, branch by branch."""

    rounds = 1

    def __init__(self, cache: TeaCache, layout: Layout, table: SchedulerTable) -> None:
        self.tensors = dict(zip(layout.branches, (p.tensor(0) for p in probes(cache, layout)), strict=True))
        self.sums = {branch: TeaCacheRule(cache, len(table.updates)) for branch in layout.branches}

    def decide(self, e: int, timestep: float, signals: Mapping[str, Tensor]) -> Mapping[str, bool]:
        return {branch: self.sums[branch].computes(e, signals[t]) for branch, t in self.tensors.items()}


def decide_by_timesteps(
    cache: TeaCache,
    component: Component,
    layout: Layout,
    tables: Mapping[int, SchedulerTable],
    *,
    timestep_scale: float,
) -> ExactDecisions:
    """TeaCache's decisions at every step count, from the embedding of the timesteps alone.

    Raises ExportError for a signal that depends on anything but the timestep, and for a model without blocks.
    """
    marks(cache, layout)
    path = mark_probe(cache, layout, layout.branches[-1]).modules[0]
    computed = {}
    for table in tables.values():
        rule = TeaCacheRule(cache, len(table.timesteps))
        signals = [read_signal(component, path, t * timestep_scale) for t in table.timesteps]
        if not torch.equal(
            signals[0], read_signal(component, path, table.timesteps[0] * timestep_scale, disturbed=True)
        ):
            raise ExportError(
                f"cache.module {path!r}: its output depends on more than the timestep; set signal = 'modulated' and calibrate, "
                "or name the module that embeds the timestep alone"
            )
        computed[table.timesteps] = tuple(rule.computes(e, s) for e, s in enumerate(signals))
    return ExactDecisions(computed)


class SignalReached(Exception):
    """The signal was computed; the rest of the denoiser need not run."""


def read_signal(component: Component, path: str, timestep: float, *, disturbed: bool = False) -> Tensor:
    """The module's first output at this timestep, for the component's example inputs or for others."""
    seen: list[Tensor] = []

    def stop(module, args, output):
        seen.append(flat_outputs(output)[0])
        raise SignalReached

    given = [
        torch.full_like(t, timestep) if name == "timestep" else (1 - t if disturbed else t)
        for name, t in zip(component.inputs, component.args, strict=True)
    ]
    handle = submodule(component.module, path).register_forward_hook(stop)
    try:
        with torch.no_grad():
            component.module(*given)
    except SignalReached:
        return seen[0]
    finally:
        handle.remove()
    raise ExportError(f"cache.module {path!r}: the denoiser does not run it")
