"""What a call of each graph costs here, in seconds: the manifest's count of its work at the pace of the calls that were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

NOMINAL_FLOPS = 1e11
"""A second's floating point operations before anything was measured: about what one core of a server has."""
RECENT = 0.2
"""The share of the last call in a graph's mean; the machine's pace changes with what else it does."""

CHANGE = 0.05
"""By which share a mean moves before sums of it are added up again."""


class CostTable:
    """Seconds of one call by graph and by the pictures that share it. `flops` is the manifest's count, for one picture.

    `version` is counted up when some of them are no longer what they were, so that sums of them are added up again then alone.
    """

    def __init__(self, flops: Mapping[str, int], flops_per_second: float = NOMINAL_FLOPS):
        self._flops = flops
        self._prior = flops_per_second
        self.version = 0
        self._means: dict[tuple[str, int], float] = {}
        self._known: dict[tuple[str, int], float] = {}  # as they were at this version
        self._pace: float | None = None

    def seconds(self, graph: str, batch: int = 1) -> float:
        """The mean of its last calls; of a graph that was not called yet its work at the pace of those that were."""
        if (graph, batch) in self._means:
            return self._means[graph, batch]
        return batch * self._flops.get(graph, 0) / (self._pace or self._prior)

    def total(self, entries: Counter[str]) -> float:
        """The seconds of so many calls of each graph, for one picture each."""
        return sum(count * self.seconds(graph) for graph, count in entries.items())

    def measure(self, graph: str, batch: int, seconds: float) -> None:
        """Takes one call into the means."""
        key = (graph, batch)
        mean = seconds if key not in self._means else (1 - RECENT) * self._means[key] + RECENT * seconds
        self._means[key] = mean
        if abs(mean - self._known.get(key, 0.0)) > CHANGE * mean:
            self.version += 1
            self._known[key] = mean
            measured = [(b * self._flops.get(g, 0), s) for (g, b), s in self._means.items()]
            work, time = sum(w for w, _ in measured), sum(s for w, s in measured if w)
            self._pace = work / time if work and time else None
