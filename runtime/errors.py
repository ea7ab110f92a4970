"""The three errors that prebake raises on purpose; each message is one sentence with the way out in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class PrebakeError(Exception):
    """Base of the three, so that a caller can catch what prebake says, and nothing else."""


class RecipeError(PrebakeError):
    """What was asked for is not valid: a recipe, an override, or an argument of the command line."""


class ExportError(PrebakeError):
    """This model cannot be exported in this way."""


class ArtifactError(PrebakeError):
    """This folder cannot be replayed here, or was called against its contract."""


def misfit(file: object, error: ValidationError, *inside: str) -> str:
    """`FILE [key.of.the.first.problem]: what is wrong there (n problems in all)`, for data that is not to its schema.

    `inside` are the keys that lead to the validated part of the file. What is wrong with a whole file names no key.
    """
    first = error.errors()[0]
    where = ".".join((*inside, *(str(part) for part in first["loc"])))
    at = f" [{where}]" if where else ""
    return f"{file}{at}: {first['msg'].removeprefix('Value error, ')} ({error.error_count()} problems in all)"
