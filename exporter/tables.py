"""What every table of a recipe is made of: strict values, and errors that name the keys involved.

`recipe/schema.py` holds the tables and each file of `caches/` one more, next to the policy that it is for.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

RecipeProblem = tuple[tuple[str, ...], str]


class ConflictError(ValueError):
    """Values that are fine alone and not together: pairs of the keys involved (the one to change first) and a sentence.

    Keys are relative to the model that raises: `mask` inside a table, `cache.mask` from the recipe.
    """

    def __init__(self, *problems: RecipeProblem) -> None:
        super().__init__("; ".join(sentence for _, sentence in problems))
        self.problems = problems


def _check_regex(pattern: str) -> str:
    """The pattern itself; ValueError where `re` cannot compile it."""
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{pattern!r} is not a regular expression: {e}") from e
    return pattern


Regex = Annotated[str, AfterValidator(_check_regex)]
Regexes = Annotated[tuple[Regex, ...], Field(strict=False)]


class RecipeTable(BaseModel):
    """Strict, so that `true` is no number and "28" no count; lists are read into tuples. The text under a key is its description
    in the JSON schema and on the page of recipe keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
