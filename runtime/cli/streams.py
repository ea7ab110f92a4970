"""Text in and out of a command, whatever the locale of whoever runs it, and wherever its output goes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import printable_line

BEYOND_ASCII = re.compile(r"[^\n -~]")


def escape_unprintable(*streams: TextIO) -> None:
    """From now on what a terminal or a file cannot show is printed as an escape, and is no error."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def print_lines(*lines: str, file: TextIO | None = None) -> None:
    """Prints lines that may hold a stranger's names, see `printable_line`."""
    for line in lines:
        print(printable_line(line), file=file)


def json_text(value: object, indent: int | None = None) -> str:
    """JSON in UTF-8 in which no character but the indentation moves a terminal's cursor: such ones are its own escapes."""

    def escape(found: re.Match[str]) -> str:
        character = found[0]
        if character.isprintable():
            return character
        return f"\\u{ord(character):04x}" if ord(character) < 1 << 16 else json.dumps(character)[1:-1]

    return BEYOND_ASCII.sub(escape, json.dumps(value, indent=indent, ensure_ascii=False))


def utf8_argument(argument: str) -> str:
    """An argument as the text that it is in UTF-8, where Python could not read it in the locale and kept its bytes (PEP 383)."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode("utf-8", "surrogateescape")
    return argument


class OutputError(Exception):
    """Stdout cannot be written, for the reason with that number of `errno`. No OSError, since it says nothing of any other file."""

    def __init__(self, reason: int) -> None:
        super().__init__(f"stdout: cannot be written ({os.strerror(reason)}); choose another place for it")
        self.reason = reason


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Inside, stdout and stderr are there, and what cannot be written to them is no bug of prebake.

    A stream that was closed before the program began takes everything and keeps nothing. So does stderr once it cannot be
    written: an export of hours does not end for a line of progress. Raises OutputError where stdout cannot be written.
    """
    fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    out, err = ResultStream(sys.stdout or open_null()), BestEffortStream(sys.stderr or open_null())
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    escape_unprintable(out.stream, err.stream)
    try:
        try:
            yield
        finally:
            out.flush()
    except OutputError:
        discard_output(out.stream)
        raise
    finally:
        sys.stdout, sys.stderr = before


def fill_closed_descriptors() -> None:
    """Gives descriptors 0, 1 and 2 to /dev/null where they are closed, or the next files that are opened would get them, and
    what a library prints would be written into those."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def open_null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def discard_output(stream: TextIO) -> None:
    """Sends to /dev/null what waits to be written and what will be: Python flushes once more at its end."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())
        stream.flush()


class ResultStream:
    """A stream for what was asked for: that it cannot be written is an OutputError, whoever writes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with output_errors():
            return self.stream.write(text)

    def flush(self) -> None:
        with output_errors():
            self.stream.flush()


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(e.errno or errno.EIO) from e


class BestEffortStream:
    """A stream that nothing depends on: once it cannot be written, all goes to /dev/null."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            discard_output(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            discard_output(self.stream)
