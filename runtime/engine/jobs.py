"""Jobs: a request in the engine, and the agenda of its pictures, which is known before the first entry runs.

An agenda is the names of the graphs that a picture will call, in order: its plan's variants, the decoder where a partial picture is
wanted, and the decoder at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ..drawing.drawing import PictureGroup
from ..drawing.request import Request
from ..finite import EvaluationCallback
from ..plan import Plan
from ..replay import Trajectory
from .costs import CostTable

OPENING = "opening"
"""The first entry of a job: its prompts are encoded, its noise is drawn, and what the loop needs beforehand is computed."""
PartialCallback = Callable[[int, int, Any], None]
"""Takes the number of the picture in its request, that of the partial one, and the picture itself; in the engine's thread."""


class PendingPictures(Future[Any]):
    """The pictures of a request, once they are drawn: `result()` is what the pipeline's call has as `images` or `frames`.

    `cancel()` works until they are there. Its request lets go of what it holds after the entry that is running. `predicted_s` is what
    the request costs alone, `queued_s` what was before it when it came.
    """

    def __init__(self, predicted_s: float, queued_s: float, on_cancel: Callable[[], None]):
        super().__init__()
        self.predicted_s, self.queued_s, self._on_cancel = predicted_s, queued_s, on_cancel

    def cancel(self) -> bool:
        """Whether they were cancelled, and so no more than the running entry is computed for them."""
        cancelled = super().cancel()
        self._on_cancel()
        return cancelled


@dataclass(eq=False)
class Picture:
    """One picture of a job: where it stands. `busy` while a runner is at it."""

    job: Job
    index: int
    group: PictureGroup
    trajectory: Trajectory
    watch: EvaluationCallback | None
    agenda: Sequence[str]
    done: int = 0
    partials: int = 0
    busy: bool = False
    final: torch.Tensor | None = None

    @property
    def next(self) -> str | None:
        """The graph of its next entry; None when it is finished."""
        return self.agenda[self.done] if self.done < len(self.agenda) else None


@dataclass(eq=False)
class Job:
    """A request in the engine. `total` is its predicted cost in seconds of one runner, `nbytes` what it holds once it was opened."""

    request: Request
    agenda: tuple[str, ...]
    count: int
    nbytes: int
    arrived: float
    costs: CostTable
    future: PendingPictures
    on_partial: PartialCallback | None = None
    total: float = 0.0
    left: Counter[str] = field(default_factory=Counter)
    pictures: list[Picture] | None = None
    opening: bool = False
    held_bytes: int = 0
    _remaining: float = 0.0
    _summed: int = -1  # the version of the costs that it was summed by

    @property
    def remaining_s(self) -> float:
        """The predicted cost of what is left, in seconds of one runner."""
        if self._summed != self.costs.version:
            self._remaining, self._summed = self.costs.total(self.left), self.costs.version
        return self._remaining

    def take_off(self, graph: str) -> None:
        """A call of that graph is done."""
        self.left[graph] -= 1
        self._summed = -1

    @property
    def busy(self) -> bool:
        """Whether a runner is at it."""
        return self.opening or any(picture.busy for picture in self.pictures or ())

    def ready(self) -> list[Picture]:
        """The pictures whose next entry can run now."""
        return [picture for picture in self.pictures or () if not picture.busy and picture.next]


def picture_agenda(plan: Plan, decoder: str | None, partials: int) -> tuple[str, ...]:
    """The graphs that a picture calls; partial pictures are made at equal distances, never more than there are evaluations between
    the first and the last. `decoder` is None where latents are wanted."""
    count = len(plan.evaluations)
    shown = {round(count * k / (partials + 1)) for k in range(1, partials + 1)} & set(range(1, count))
    agenda: list[str] = []
    for e, evaluation in enumerate(plan.evaluations):
        if decoder and e in shown:
            agenda.append(decoder)
        agenda.append(evaluation.variant)
    return (*agenda, decoder) if decoder else tuple(agenda)


def count_entries(agenda: Sequence[str], pictures: int) -> Counter[str]:
    """How often a job calls each graph."""
    return Counter({OPENING: 1, **{graph: count * pictures for graph, count in Counter(agenda).items()}})
