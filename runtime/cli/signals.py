"""Signals that end a command, as an exception: `with` blocks then take away what they have made, as for Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """The system, a scheduler or a closed terminal has asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def end_by_exception() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Terminated in the main thread, unless whoever began the process ignores them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, raise_terminated)
        for number in ENDING_SIGNALS
        if signal.getsignal(number) is signal.SIG_DFL
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_terminated(number: int, _frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one would end the cleaning up
    raise Terminated(number)


def describe_interrupt(error: KeyboardInterrupt) -> tuple[int, str]:
    """Exit code and word: 130 and `interrupted` for Ctrl-C, 143 and `ended by SIGTERM`."""
    return (error.exit_code, f"ended by {error}") if isinstance(error, Terminated) else (130, "interrupted")
