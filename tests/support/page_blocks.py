"""The blocks of the pages that a reader may run, and how they are run: page by page, in their order, in one folder.

A comment before a block says why it is not run as the others are:

    <!-- not run: REASON -->         never; its `prebake` lines are parsed all the same
    <!-- slow: REASON -->            by `make test-all`
    <!-- run by: test_file.py -->    by that test, which reads the page
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"<!-- (not run|slow|run by): (.+?) -->")

sys.path.append(str(ROOT / "docs"))  # last, since its module has a short name
import hooks  # noqa: E402


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    mark: str
    """`run`, or the first word of its comment."""
    reason: str
    named: str
    """The file that the text before it names last, such as `mine.toml`."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for found in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        before = text[: found.start()]
        comment = MARK.fullmatch((before.rstrip().splitlines() or [""])[-1].strip())
        mark, reason = comment.groups() if comment else ("run", "")
        names = re.findall(r"`([\w.-]+\.toml)`", before)
        line = before.count("\n") + 1
        yield Block(str(page.relative_to(ROOT)), line, found[2], found[3], mark, reason, names[-1] if names else "")


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNABLE = [block for block in BLOCKS if block.language in ("sh", "bash", "python")]


def command_lines(block: Block) -> Iterator[str]:
    """The lines of a shell block, joined where one ends in a backslash; without empty ones and comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line


def prebake_arguments(line: str) -> list[str] | None:
    """The arguments of a line that calls `prebake`, without what the shell would take; None for any other line."""
    words = shlex.split(line, comments=True)
    if words[0] != "prebake":
        return None
    return words[1 : words.index(">") if ">" in words else None]


# --- running ---------------------------------------------------------------------------------------------------------


class Reader:
    """Someone who types what a page shows, in the present folder."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "page"}

    def follow(self, blocks: list[Block]) -> None:
        for block in blocks:
            if block.language == "toml" and block.named:
                Path(block.named).write_text(block.text, "utf-8")
            elif block.language == "python":
                exec(compile(block.text, str(block), "exec"), self.names)
            elif block.language in ("sh", "bash"):
                for line in command_lines(block):
                    self.type(line, block)

    def type(self, line: str, block: Block) -> None:
        """Runs one line; `# exit code N` at its end says what must come of it."""
        said = re.search(r"# exit code (\d+)", line)
        expected = int(said[1]) if said else 0
        arguments = prebake_arguments(line)
        if arguments is None:
            code = subprocess.run(["bash", "-c", line], check=False).returncode
        else:
            with self.redirected(line):
                try:
                    code = hooks.main()(arguments)
                except SystemExit as e:
                    code = e.code
        assert code == expected, f"{block}: {line}"

    @contextlib.contextmanager
    def redirected(self, line: str) -> Iterator[None]:
        """With what follows a `>` as stdout."""
        words = shlex.split(line, comments=True)
        if ">" not in words:
            yield
            return
        with Path(words[-1]).open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
            yield

    def asks(self, prompt: str) -> bytes:
        """What the WSGI application of the page answers, if it has one."""
        statuses: list[str] = []
        body = b"".join(
            self.names["app"]({"QUERY_STRING": f"prompt={prompt}&seed=0"}, lambda status, _: statuses.append(status))
        )
        assert statuses == ["200 OK"]
        return io.BytesIO(body).getvalue()
