"""The errors that prebake raises on purpose, and their exit codes; each message is one sentence with the way out in it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING
from unicodedata import category

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ValidationError

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "a bug in prebake, with its traceback",
    2: "bad input: the arguments of a command or a call, the recipe or a matrix, or a package that is not installed",
    3: "this model cannot be exported so",
    4: "a threshold of the recipe is missed",
    5: "the artifact is refused: it is damaged, or not for this machine",
    130: "interrupted",
    141: "whoever read its output is gone",
    143: "ended by SIGTERM",
}


MAX_TOLD = 1000  # problems in one error


class PrebakeError(Exception):
    """What prebake refuses on purpose: the base of all below, so that a caller can catch that and nothing else.

    `exit_code` is the command line's (docs/ci.md), `http_status` what a server answers with. Below are two kinds: CallerError,
    what was asked wrongly, and ResourceError, what is wrong with that which is there. Only Cancelled is neither.
    """

    exit_code: int
    http_status: int


class CallerError(PrebakeError):
    """What was asked for cannot be had so: ask in another way. Exit code 2, and a server's 400."""

    exit_code = 2
    http_status = 400


class RecipeError(CallerError):
    """A recipe, an override, a matrix, or an option of an export or a comparison is not valid."""


class RequestError(CallerError):
    """An argument of a call or of a command is none, is not what the artifact was exported for, or names a file in the way."""


class ResourceError(PrebakeError):
    """The artifact, the model or this machine is not fit for it, however it is asked for. A server's 500."""

    http_status = 500


class ExportError(ResourceError):
    """This model cannot be exported in this way."""

    exit_code = 3


class QualityError(ExportError):
    """It was exported, compared with its pipeline, and misses a threshold of its recipe."""

    exit_code = 4


class ArtifactError(ResourceError):
    """This folder cannot be replayed here: it is damaged, of another version, or for another machine."""

    exit_code = 5


class Cancelled(PrebakeError):
    """A call was ended from outside, by its `cancel`."""

    exit_code = 130
    http_status = 499


def raise_problems(folder: object, problems: Iterable[str]) -> None:
    """One ArtifactError, a line for each problem, or nothing when there are none. Of very many the first are told."""
    told = iter(problems)
    lines = [printable_line(f"{folder}: {line}") for line in islice(told, MAX_TOLD)]
    if next(told, None) is not None:
        lines.append(f"{folder}: and more problems than these {MAX_TOLD}")
    if lines:
        raise ArtifactError("\n".join(lines))


def describe_schema_error(file: object, error: ValidationError, *inside: str) -> str:
    """`FILE [key.of.the.first.problem]: what is wrong there (3 problems in all)`, for data that is not to its schema.

    `inside` are the keys that lead to the validated part of the file. What is wrong with a whole file names no key.
    """
    first, count = error.errors(include_url=False, include_context=False, include_input=False)[0], error.error_count()
    where = ".".join((*inside, *(f"{part!s:.80}" for part in first["loc"])))
    at = f" [{where}]" if where else ""
    what = "is not a key that this version knows" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{file}{at}: {what.removeprefix('Value error, ')}" + (f" ({count} problems in all)" if count > 1 else "")


def printable_line(text: str) -> str:
    """The text with an escape in place of what moves the cursor, begins a line or turns the direction of writing: names in an
    artifact are a stranger's, and a terminal obeys what it is sent."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def first_line(error: BaseException) -> str:
    """The first line of what the error says; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def error_summary(error: BaseException) -> str:
    """The error as one line, `Type: first line of its message`."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def describe_read_error(error: OSError, folder: object) -> str:
    """A sentence that says why the system does not give a file of the artifact in `folder`, and the way out."""
    if isinstance(error, PermissionError):
        return f"this user may not read it ({error.strerror}); its owner can change that: chmod -R a+rX {folder}"
    return f"cannot be read ({error.strerror}); if its disk is failing, restore the file on another one"
