"""What `push` and `pull` say while bytes move: a bar on a terminal, plain lines where there is none, JSON lines for programs,
or nothing. Whoever moves bytes knows only `TransferProgress`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Literal

from ..text import format_bytes

TransferProgressMode = Literal["rich", "json", "quiet"]


class TransferProgress:
    """The base is the quiet one. `library` says whether a library that moves bytes itself may draw its own bars."""

    library = False

    def __enter__(self) -> TransferProgress:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""

    def begin(self, stage: str, total: int = 0) -> None:
        """A stage begins, of `total` bytes that will be told by `advance`; 0 where nobody tells."""

    def file(self, path: str, size: int) -> None:
        """The next file of the stage begins."""

    def advance(self, count: int) -> None:
        """So many bytes more have moved."""

    def note(self, text: str) -> None:
        """Something that the user should know, and that stays to be read."""


class LineTransferProgress(TransferProgress):
    """One line on stderr for what begins, with the seconds so far: for logs, which cannot move the cursor."""

    def __init__(self) -> None:
        self.start, self.stage = time.perf_counter(), ""

    def begin(self, stage: str, total: int = 0) -> None:
        self.stage = stage
        self.say("begin", format_bytes(total) if total else "")

    def file(self, path: str, size: int) -> None:
        self.say("file", f"{path} ({format_bytes(size)})")

    def note(self, text: str) -> None:
        self.say("note", text)

    def say(self, event: str, what: str) -> None:
        subject = event if event == "note" else self.stage
        text = f"{subject}: {what}" if what else subject
        print(f"[{self.seconds():7.1f} s] {text}", file=sys.stderr, flush=True)

    def seconds(self) -> float:
        return time.perf_counter() - self.start


class JsonTransferProgress(LineTransferProgress):
    """One object per event on stderr: {"stage": ..., "event": ..., "what": ..., "elapsed_s": ...}."""

    def say(self, event: str, what: str) -> None:
        said = {"stage": self.stage, "event": event, "what": what, "elapsed_s": round(self.seconds(), 2)}
        print(json.dumps(said), file=sys.stderr, flush=True)


class RichTransferProgress(TransferProgress):
    """A bar of bytes by rich, for each stage. Finished stages stay as lines."""

    library = True

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim"),
        )
        self.rich = Progress(*columns, console=Console(stderr=True))
        self.task: Any = None

    def __enter__(self) -> RichTransferProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.rich.stop()

    def begin(self, stage: str, total: int = 0) -> None:
        if total:
            self.rich.start()
            self.task = self.rich.add_task(stage, total=total, what="")
        else:  # the library draws, or nothing is counted: two live displays would write over each other
            self.rich.stop()
            self.rich.console.print(stage)

    def file(self, path: str, size: int) -> None:
        if self.task is not None:
            self.rich.update(self.task, what=path)

    def advance(self, count: int) -> None:
        if self.task is not None:
            self.rich.advance(self.task, count)

    def note(self, text: str) -> None:
        self.rich.console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def open_transfer_progress(mode: TransferProgressMode) -> TransferProgress:
    """What to say for that mode. A terminal gets lines, too, where rich is not installed: it comes with `prebake[export]`."""
    if mode != "rich":
        return {"json": JsonTransferProgress, "quiet": TransferProgress}[mode]()
    try:
        return RichTransferProgress() if sys.stderr.isatty() else LineTransferProgress()
    except ModuleNotFoundError:
        return LineTransferProgress()
