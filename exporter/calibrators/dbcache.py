"""DBCache's decisions as they are made: the residual of each list's first blocks against the last computed one's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..caches.dbcache import BlockList, DBCache, DBCacheRule, find_block_lists
from ..plan.sampler import SchedulerTable
from ..sites.layout import Layout
from ..sites.marks import Mark
from .firstblock import find_hidden_tensor


def probes(cache: DBCache, layout: Layout) -> tuple[Mark, ...]:
    """The sites of what the first blocks of each list add."""
    return tuple(mark_probe(cache, layout, b) for b in find_block_lists(cache, layout))


def mark_probe(cache: DBCache, layout: Layout, b: BlockList) -> Mark:
    n = cache.Fn_compute_blocks
    return layout.residual(b.branch, b.start, b.start + n, name=f"{b.name}[0:{n}]")


class OnlineRule:
    """cache-dit's decisions. A later list looks at what an earlier one's decision gave, so there is a round for each."""

    def __init__(self, cache: DBCache, layout: Layout, table: SchedulerTable) -> None:
        self.cache, self.branches = cache, layout.branches
        self.lists = {b.key: b for b in find_block_lists(cache, layout)}
        self.tensors = {
            key: find_hidden_tensor(mark_probe(cache, layout, b), cache.method) for key, b in self.lists.items()
        }
        self.names = list(dict.fromkeys(b.name for b in self.lists.values()))
        self.rounds, self.calls = len(self.names), 0
        self.rules: dict[str, DBCacheRule] = {}
        self.computed: dict[str, Tensor] = {}

    def decide(self, e: int, timestep: float, signals: Mapping[str, Tensor]) -> Mapping[str, bool]:
        name = self.names[self.calls % self.rounds]
        self.calls += 1
        fresh = {key: signals[self.tensors[key]] for key, b in self.lists.items() if b.name == name}
        if self.cache.enable_separate_cfg and len(fresh) == 2:
            return self.apart(e, fresh)
        together = torch.cat(list(fresh.values()))  # as pipelines batch them
        return dict.fromkeys(fresh, self.computes(e, name, together, LazyDifference(self.computed.get(name), together)))

    def apart(self, e: int, fresh: Mapping[str, Tensor]) -> dict[str, bool]:
        """The two branches, the conditional one first, whose difference may count for the other."""
        uncond, cond = fresh
        own = {key: LazyDifference(self.computed.get(key), x) for key, x in fresh.items()}
        decided = {cond: self.computes(e, cond, fresh[cond], own[cond])}
        shared = not self.cache.cfg_diff_compute_separate and not self.cache.cfg_compute_first
        if shared and own[cond].value is not None:
            own[uncond].value = own[cond].value
        return decided | {uncond: self.computes(e, uncond, fresh[uncond], own[uncond])}

    def computes(self, e: int, key: str, fresh: Tensor, difference: LazyDifference) -> bool:
        rule = self.rules.setdefault(key, DBCacheRule(self.cache))
        if computes := rule.computes(e, difference if difference.before is not None else None):
            self.computed[key] = fresh
        return computes


class LazyDifference:
    """mean|before - now| / mean|before|, looked at or not: `value` is None until it was."""

    def __init__(self, before: Tensor | None, now: Tensor) -> None:
        self.before, self.now = before, now
        self.value: float | None = None

    def __call__(self) -> float:
        if self.value is None:
            assert self.before is not None
            self.value = ((self.before - self.now).abs().mean() / self.before.abs().mean()).item()
        return self.value
