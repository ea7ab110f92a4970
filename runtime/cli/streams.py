"""Text in and out of a command, whatever the locale of whoever runs it."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from typing import TextIO

from ..errors import printable_line

BEYOND_ASCII = re.compile(r"[^\n -~]")


def escape_unprintable() -> None:
    """From now on what a terminal or a file cannot show is printed as an escape, and is no error."""
    for stream in (sys.stdout, sys.stderr):
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
