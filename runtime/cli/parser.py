"""The parser of a command line: options in full alone, and the nearest right name for a wrong one.

`CommandParser` is argparse's, and so are the parsers of its commands. An abbreviated option would mean another one as soon as
a further option begins with the same letters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class UsageError(SystemExit):
    """A command line that cannot be parsed; it has been told on stderr, as argparse tells it."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class CommandParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations; what it refuses names the nearest of what there is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]  (an overload)
        """As argparse's, but a command's own parser refuses what it does not know, with its own usage and options."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(describe_unknown(unknown, self._option_string_actions))
        return parsed, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = None if action.choices is None else [str(choice) for choice in action.choices]
        if choices is not None and value not in choices:
            near = suggest_nearest(str(value), choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{near} (choose from {', '.join(choices)})")

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise UsageError(message)


def describe_unknown(unknown: Sequence[str], options: Iterable[str]) -> str:
    """`unrecognized arguments: --stepz 4; did you mean --steps?`, for the first of them that is near an option."""
    names = list(options)
    for argument in unknown:
        if argument.startswith("-") and (near := suggest_nearest(argument.partition("=")[0], names)):
            return f"unrecognized arguments: {' '.join(unknown)}{near}"
    return f"unrecognized arguments: {' '.join(unknown)}"


def suggest_nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean --steps?`, or nothing where nothing known is near. What begins with the name is near."""
    begun = [each for each in known if len(name) > 2 and each.startswith(name)]
    near = begun or get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
