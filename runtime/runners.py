"""Runners: how many calls of a pipeline are at work at once, and how a waiting or working call is cancelled.

A call needs memory for its own latents, stored sites and activations, and threads to compute with. So no more than a
fixed number of them is let in; the others wait, first come, first served. What they share, the weights and the code,
is read only.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from .call.arguments import whole_number
from .errors import Cancelled, RequestError
from .memory import trim_heap
from .process.fork import tell_of_forks
from .process.usage import Usage

LONG_CALL_S = 0.25
"""A call that took longer is one of a large model: if nobody is at work after it, what its activations lay in goes back to the
system. That takes milliseconds, and leaves an idle process with little more than the weights' pages, which all processes share."""
POLL_S = 0.02
"""How often a waiting call looks whether it has been cancelled."""


class CancelFlag(Protocol):
    """What a call is cancelled by: a `threading.Event`, or anything that says the same."""

    def is_set(self) -> bool: ...


class EitherFlag:
    """Set where one of several is; None is never."""

    def __init__(self, *flags: CancelFlag | None):
        self._flags = [flag for flag in flags if flag is not None]

    def is_set(self) -> bool:
        return any(flag.is_set() for flag in self._flags)


class Runners:
    """At most `count` calls at once. A callback may call the pipeline again: it goes on with the runner of its thread."""

    def __init__(self, count: int, usage: Usage | None = None):
        count = whole_number("runners", count)
        if count < 1:
            raise RequestError(f"runners={count}: expected how many calls may run at once, 1 or more")
        self.count = count
        self.usage = usage or Usage("the artifact")
        self._thread = threading.local()
        self._make_all_free()
        tell_of_forks(self)

    def _make_all_free(self) -> None:
        self._lock = threading.Lock()
        self._free = self.count
        self._waiting: deque[threading.Event] = deque()

    def after_fork(self) -> None:
        """Whoever had a runner, or waited for one, is not in this process."""
        self._make_all_free()

    @property
    def free(self) -> int:
        """How many are idle."""
        return self._free

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for one."""
        return bool(self._waiting)

    @contextmanager
    def one(self, cancel: CancelFlag | None = None) -> Iterator[None]:
        """A runner, for the length of the block, whatever ends it. Raises Cancelled, also while it waits for one, and what
        `Usage.inside` raises."""
        refuse_cancelled(cancel)
        self.usage.refuse_unusable()
        if getattr(self._thread, "has_one", False):
            yield
            return
        self._take(cancel)
        self._thread.has_one = True
        began = time.monotonic()
        try:
            with self.usage.inside():
                yield
        finally:
            self._thread.has_one = False
            self._give_back()
            if self._free == self.count and time.monotonic() - began > LONG_CALL_S:
                trim_heap()

    def _take(self, cancel: CancelFlag | None) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        try:
            while not turn.wait(POLL_S if cancel else None):
                refuse_cancelled(cancel)
        except BaseException:
            with self._lock:
                left = turn in self._waiting
                if left:
                    self._waiting.remove(turn)
            if not left:  # it was handed over just now
                self._give_back()
            raise

    def _give_back(self) -> None:
        """Hands the runner to whoever waits the longest: one that were merely free would go to the thread that is awake."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free = min(self._free + 1, self.count)  # a fork within a call has freed it already


def refuse_cancelled(cancel: CancelFlag | None) -> None:
    """Raises Cancelled if it has been."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("the call was cancelled by its `cancel`")


def default_runner_count(device: torch.device) -> int:
    """On the CPU as many as keep all cores busy, each with torch's number of threads; a GPU computes one call at a time."""
    if device.type != "cpu":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads())
