"""The progress bar of a call, tqdm's as in diffusers: of steps, over all pictures. By default it is there in a terminal."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .arguments import unknown_argument_error

Advance = Callable[[int], object]
"""Moves the bar by so many steps."""
FIXED_OPTIONS = ("self", "iterable", "total", "kwargs")


def check_bar_options(options: Mapping[str, Any]) -> None:
    """Raises RequestError for what is no option of tqdm's."""
    from tqdm import tqdm

    known = [name for name in inspect.signature(tqdm.__init__).parameters if name not in FIXED_OPTIONS]
    for name in options:
        if name not in known:
            raise unknown_argument_error(name, "tqdm", known)


@contextmanager
def step_bar(options: Mapping[str, Any], total: int) -> Iterator[Advance | None]:
    """A bar of `total` steps, for the length of the block, by tqdm's options; None where nothing is shown."""
    hidden = options.get("disable")
    if hidden is None:
        hidden = not is_terminal(options.get("file") or sys.stderr)
    if hidden:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, **{**options, "disable": False}) as bar:
        yield bar.update


def is_terminal(stream: Any) -> bool:
    """Whether somebody looks at the stream while it is written. A process may have no standard error at all."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
