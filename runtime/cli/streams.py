"""Text in and out of a command, whatever the locale of whoever runs it."""

from __future__ import annotations

import io
import os
import sys


def escape_unprintable() -> None:
    """From now on what a terminal or a file cannot show is printed as an escape, and is no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def utf8_argument(argument: str) -> str:
    """An argument as the text that it is in UTF-8, where Python could not read it in the locale and kept its bytes (PEP 383)."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode("utf-8", "surrogateescape")
    return argument
