"""Ways for a process to be killed at a chosen moment, without a chance to clear up. The processes are children of `unpack_kills.py`
and `staging_kills.py`.

Moments are steps: Python's own audit events (PEP 578) for what is opened, made, renamed or removed in one folder.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.call_function")


def die_at(step: int, folder: Path) -> None:
    """Lets SIGKILL end this process at the step of that number in `folder`, before it is done."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in EVENTS and (event.startswith("ctypes") or str(folder) in str(args[0])):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_after(size: int) -> None:
    """Lets the kernel end this process in the middle of a write: as soon as it has put that many bytes into one file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def killed(work: Callable[[], object], deadly: Callable[[], object]) -> int:
    """The signal that ended a child which did `work`; 0 where it came to the end."""
    if (child := os.fork()) == 0:
        try:
            deadly()
            work()
        except BaseException as e:
            print(repr(e), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code <= 0, "the child failed, see above"
    return -code


def steps(work: Callable[[], object], folder: Path) -> Iterator[int]:
    """Kills a child that does `work` at its first step, another one at its second, and so on, until one comes to the end;
    gives the signal of each as soon as it has ended."""
    for step in range(1, 10_000):
        signal_ = killed(work, lambda step=step: die_at(step, folder))
        yield signal_
        if not signal_:
            return
