"""Usage: whether an open artifact may still be used in this process, and which threads are at it just now."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ArtifactError, RequestError
from .fork import came_through_fork, tell_of_forks

POLL_S = 0.01
"""How often `close` looks whether the last thread has left."""


class Usage:
    """Of one open artifact, `name` in messages. `forkable`: whether its graphs run in a forked process too."""

    def __init__(self, name: object, *, forkable: bool = False):
        self._name = name
        self._forkable = forkable
        self._inside: list[int] = []  # a thread's id for each block that it is in; one operation changes it, so no lock
        self._closed = False
        self._lost: str | None = None
        tell_of_forks(self)

    @property
    def closed(self) -> bool:
        return self._closed

    def after_fork(self) -> None:
        """What another thread was at stays half done here, locks and all; and libraries have lost the threads that they began."""
        if self._inside:
            self._lost = "while a call was at work, which nobody can finish here"
        elif not self._forkable:
            self._lost = "after it was opened, and its backend does not outlive that"
        self._inside = []

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The block uses the artifact. Raises RequestError where it is closed, ArtifactError where a fork has spoilt it."""
        ident = threading.get_ident()
        inside = self._inside
        at_work = ident in inside  # a call that began before `close` goes on to its end
        inside.append(ident)
        try:
            if not (at_work and self._closed):
                self.refuse_unusable()
            yield
        finally:
            inside.remove(ident)

    def refuse_unusable(self) -> None:
        if self._closed:
            raise RequestError(f"{self._name}: it was closed; load it again")
        if self._lost or came_through_fork():
            lost = self._lost or "after it was opened, and its threads are gone"
            raise ArtifactError(
                f"{self._name}: this process was forked {lost}; load it after the fork, in every process for itself "
                "(gunicorn without --preload), or start processes by spawn"
            )

    def close(self) -> bool:
        """Lets nobody in any more, and waits until all have left. Whether it was open before.

        Raises RequestError inside a block of the same thread, which would wait for itself.
        """
        if threading.get_ident() in self._inside:
            raise RequestError(
                f"{self._name}: closed by a callback of its own call, which would wait for itself; close it afterwards"
            )
        was_open, self._closed = not self._closed, True
        while self._inside:
            time.sleep(POLL_S)
        return was_open
