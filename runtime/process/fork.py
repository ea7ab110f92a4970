"""Forks: a process that `os.fork` has made of one that holds an open artifact.

Of the threads of the forking process one is left, and OpenMP believes that its helpers are still there: the first parallel
loop of that thread waits for them for ever. A thread that begins afterwards gets helpers of its own, so calls are made there.
"""

from __future__ import annotations

import contextvars
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from ..memory import require_room

T = TypeVar("T")
EXIT_S = 1.0
"""How long an ended thread is waited for; it takes less than a millisecond."""


class ForkListener(Protocol):
    """What has to know of a fork, in the process that it makes."""

    def after_fork(self) -> None:
        """Called before anything else, while there is one thread."""
        ...


_listeners: weakref.WeakSet[ForkListener] = weakref.WeakSet()
_survivors: set[int] = set()
"""The thread that came through the last fork. Both are facts of the process, as its id is."""


def tell_of_forks(listener: ForkListener) -> None:
    """Has its `after_fork` called in every process that is forked from this one, for as long as it lives."""
    _listeners.add(listener)


def _after_fork() -> None:
    _survivors.clear()
    _survivors.add(threading.get_ident())
    for listener in list(_listeners):
        listener.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def came_through_fork() -> bool:
    """Whether this thread is older than its process, and so may wait for ever in a parallel loop."""
    return threading.get_ident() in _survivors


def run_beside_fork(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """What `work` returns or raises: made here, or in a new thread where this one came through a fork."""
    return run_in_new_thread(work, stop) if came_through_fork() else work()


def run_in_new_thread(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """What `work` returns or raises, made in a thread that is gone when this returns, with all that it had of its own.

    An exception that this thread gets meanwhile (Ctrl-C) calls `stop`, which should end the work, and waits for that.
    """
    results: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            require_room()
            results.append(work())
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()
    try:
        thread.join()
    except BaseException:
        stop()
        thread.join()
        raise
    wait_for_exit(thread)
    if raised:
        raise raised[0]
    return results[0]


def wait_for_exit(thread: threading.Thread) -> None:
    """Waits until the system has let go of a thread that was joined: Python lets go of it before, and what libraries have of
    their own in each thread is freed between. No more than `EXIT_S`."""
    ends = time.monotonic() + EXIT_S
    while Path(f"/proc/self/task/{thread.native_id}").exists() and time.monotonic() < ends:
        time.sleep(0.0002)
