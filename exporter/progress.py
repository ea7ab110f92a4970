"""What an export says while it runs: a bar on a terminal, plain lines where there is none, JSON lines for programs, or
nothing. Stages only know `Progress`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

ProgressMode = Literal["rich", "json", "quiet"]


class Progress:
    """The base is the quiet one: it says nothing, and keeps for the report how long stages took, and where the code of each
    graph came from, "compiled" or "from the cache"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.graphs: dict[str, str] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[None]:
        """Begins a stage of the export, made of `total` things to do."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def announce(self, what: str) -> None:
        """The next thing begins; the one before it is done."""

    def note(self, text: str) -> None:
        """Something that the user should know, and that stays to be read."""


class JsonProgress(Progress):
    """One object per event on stderr: {"stage": ..., "doing": ..., "elapsed_s": ...}; stdout stays for the result."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.current = time.perf_counter(), ""

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[None]:
        self.current = name
        self.say(event="start")
        with super().stage(name, total):
            yield
        self.say(event="done")

    def announce(self, what: str) -> None:
        self.say(event="doing", what=what)

    def note(self, text: str) -> None:
        self.say(event="note", what=text)

    def say(self, **event: Any) -> None:
        print(
            json.dumps({"stage": self.current, "elapsed_s": round(time.perf_counter() - self.start, 2), **event}),
            file=sys.stderr,
            flush=True,
        )


class ProgressLines(Progress):
    """One line on stderr for what begins, with the seconds so far: for logs, which cannot move the cursor."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.current = time.perf_counter(), ""

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[None]:
        self.current = name
        self.say(name)
        with super().stage(name, total):
            yield

    def announce(self, what: str) -> None:
        self.say(f"{self.current}: {what}")

    def note(self, text: str) -> None:
        self.say(f"note: {text}")

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:7.1f} s] {text}", file=sys.stderr, flush=True)


class ProgressBar(Progress):
    """A rich bar on stderr: stage, what is being compiled, position, elapsed. Finished stages stay as lines."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim"),
        )
        self.rich = RichProgress(*columns, console=Console(stderr=True))
        self.task: Any = None
        self.begun, self.total = 0, 1

    def __enter__(self) -> ProgressBar:
        self.rich.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.rich.stop()

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[None]:
        self.task, self.begun, self.total = self.rich.add_task(name, total=total, what=""), 0, total
        with super().stage(name, total):
            yield
        self.rich.update(self.task, completed=total, what="")

    def announce(self, what: str) -> None:
        # one short of the total at most: a full bar stops its clock, and stages may do more than they announced
        self.rich.update(self.task, what=what, completed=min(self.begun, self.total - 1))
        self.begun += 1

    def note(self, text: str) -> None:
        self.rich.console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def open_progress(mode: ProgressMode) -> Progress:
    """The Progress of that mode, to be entered before the first stage."""
    shown = ProgressBar if sys.stderr.isatty() else ProgressLines
    return {"rich": shown, "json": JsonProgress, "quiet": Progress}[mode]()
