"""Which job goes on: the one with the least left to do, unless another has waited for as long as is fair. No clock, no lock, no tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

STRETCH = 8.0
"""A job is due once it has been here for so many times as long as it takes alone."""
GRACE_S = 1.0
"""And for that long: a job of milliseconds that waits for one evaluation is not treated unfairly."""


class Candidate(Protocol):
    """A job as the order sees it: when it came, and what of it is left and was there in all, in seconds of one runner."""

    arrived: float

    @property
    def total(self) -> float: ...
    @property
    def remaining_s(self) -> float: ...


CandidateT = TypeVar("CandidateT", bound=Candidate)


def due_time(job: Candidate, stretch: float = STRETCH) -> float:
    """When the job should have been finished, to be fair."""
    return job.arrived + GRACE_S + stretch * job.total


def is_urgent(job: Candidate, now: float, stretch: float = STRETCH) -> bool:
    """Whether it is late unless it goes on now."""
    return due_time(job, stretch) - now <= job.remaining_s


def order_jobs(jobs: Iterable[CandidateT], now: float, stretch: float = STRETCH) -> list[CandidateT]:
    """The jobs, first the one to go on. Urgent ones come before all others, in the order of their due times, so that nothing that is
    due later than a job delays it then; of the others that with the least left, which makes the mean wait the shortest."""

    def rank(job: CandidateT) -> tuple[bool, float, float]:
        due, remaining = due_time(job, stretch), job.remaining_s
        relaxed = due - now > remaining
        return relaxed, remaining if relaxed else due, job.arrived

    return sorted(jobs, key=rank)
