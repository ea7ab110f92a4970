"""A command from its arguments to its exit code: how what is refused is told, in words on stderr, with --json on stdout too.

`prebake` and `python -m prebake.runtime` are two `CommandLine`s. With --json stdout is one JSON document, whatever happens:
the result, or a failure as `Failure.as_json` has it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PrebakeError, RequestError
from .parser import CommandParser, UsageError
from .signals import describe_interrupt, end_by_exception
from .streams import OutputError, json_text, print_lines, standard_streams

READER_GONE = 141  # as a shell tells SIGPIPE
SUBJECT = re.compile(r"(?P<key>(?:(?!, |; |: ).){1,300}): ")
"""What a sentence is about, as all of prebake's begin: `--set cache.order=x: expected ...`."""


@dataclass(frozen=True)
class Failure:
    """Why a command did not do what it was asked for. `message` has a line for each problem."""

    exit_code: int
    kind: str
    message: str

    def as_json(self) -> dict[str, Any]:
        """`exit_code`, `kind` (the exception's name) and `problems`, each with its `sentence` and the `key` that this begins with."""
        problems = [{"key": problem_key(line), "sentence": line} for line in self.message.split("\n")]
        return {"exit_code": self.exit_code, "kind": self.kind, "problems": problems}


def problem_key(sentence: str) -> str | None:
    """What the sentence is about: the option, argument, key or path before its first colon; None where it names none."""
    found = SUBJECT.match(sentence)
    return found["key"] if found else None


@dataclass(frozen=True)
class CommandLine:
    """A program with commands. `prefix` begins each line of an error, `notes` say what an interrupted command leaves, and
    `missing` says what to install, where that is what an error is about."""

    parser: CommandParser
    prefix: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[Exception, str], str | None] = lambda error, command: None

    def run(self, argv: Sequence[str] | None) -> int:
        """Runs one command; its exit code. A bug is told as JSON, too, where that was asked for, and keeps its traceback."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        try:
            with standard_streams(), end_by_exception():
                return self._run_in_json(arguments) if asks_for_json(arguments) else self._run(arguments)[0]
        except OutputError as e:
            if e.reason == errno.EPIPE:  # `prebake inspect ARTIFACT | head -1`
                return READER_GONE
            print_errors(str(e), self.prefix)
            return RequestError.exit_code

    def _run_in_json(self, arguments: list[str]) -> int:
        """Holds back what is printed until it is known how the command ended."""
        printed, failure, bug = io.StringIO(), None, None
        try:
            with contextlib.redirect_stdout(printed):
                code, failure = self._run(arguments)
        except UsageError as e:
            code, bug = 2, e
            failure = Failure(2, "UsageError", e.message)
        except SystemExit:  # --help and --version
            print(printed.getvalue(), end="")
            raise
        except OutputError:
            raise
        except Exception as e:
            code, bug = 1, e
            failure = Failure(1, type(e).__name__, str(e) or type(e).__name__)
        if failure is None:
            print(printed.getvalue(), end="")
        else:
            print(json_text(failure.as_json(), indent=2))
        if bug:
            raise bug
        return code

    def _run(self, arguments: list[str]) -> tuple[int, Failure | None]:
        args = self.parser.parse_args(arguments)
        try:
            return args.run(args), None
        except KeyboardInterrupt as e:
            failure = Failure(*self._describe_interrupt(e, args))
            print(f"{self.prefix}{failure.message}", file=sys.stderr)
        except PrebakeError as e:
            failure = Failure(e.exit_code, type(e).__name__, str(e))
            print_errors(failure.message, self.prefix)
        except Exception as e:
            if not (said := self.missing(e, args.command)):
                raise
            failure = Failure(2, type(e).__name__, said)
            print_errors(said, self.prefix)
        return failure.exit_code, failure

    def _describe_interrupt(self, error: KeyboardInterrupt, args: argparse.Namespace) -> tuple[int, str, str]:
        code, word = describe_interrupt(error)
        return code, type(error).__name__, word + self.notes.get(args.command, "")


def print_errors(message: str, prefix: str) -> None:
    """One line on stderr for each problem."""
    print_lines(*(f"{prefix}error: {line}" for line in message.split("\n")), file=sys.stderr)


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether `--json` is among the options, known before they are parsed: a wrong option is a failure, too."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options
