"""A scheduler that is followed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class SchedulerObserver:
    """A method of a scheduler, after which `then` gets its result and what it was called with. A deep copy of the scheduler
    has its plain method again."""

    def __init__(self, owner: Any, name: str, then: Callable[..., None]) -> None:
        self._owner, self._name, self.then = owner, name, then
        self._method = getattr(owner, name)
        functools.update_wrapper(self, self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        self.then(result, *args, **kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self._owner), self._owner)
        return getattr(type(owner), self._name).__get__(owner)


def schedule_steps(scheduler: Any) -> int:
    """How many steps the schedule has that was set last."""
    return int(getattr(scheduler, "num_inference_steps", None) or len(scheduler.timesteps))
