"""Options: what one `prebake verify` draws, and of which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...runtime.errors import RecipeError
from ..recipe.duration import parse_duration
from ..recipe.resolve import Recipe
from .prompt_choice import read_prompts

T = TypeVar("T")


@dataclass(frozen=True)
class VerifyOptions:
    """What one `prebake verify` draws. Without `with_source`, only the golden vectors are replayed.

    `model` says where the pipeline is, if not where the manifest says. `prompts` and `seeds` stand in for the recipe's;
    `prompt_set` is "recipe", "accuracy" (the prompts that the model's checker judges), or "all". `limit` is the largest
    number of prompts of each. `budget` stands in for the recipe's `verify.budget`; what is chosen by one of the others is drawn
    however long it takes. `results` is a folder in which eager's answers are kept; `part` (k, n) draws the k-th of n parts for it.
    """

    with_source: bool = False
    model: str | None = None
    prompts: Path | None = None
    prompt_set: str = "all"
    seeds: int | None = None
    limit: int | None = None
    budget: str | None = None
    results: Path | None = None
    part: tuple[int, int] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the recipe's prompts and seeds, and all checked prompts, are drawn."""
        chosen = (self.prompts, self.seeds, self.limit, self.part)
        return self.with_source and self.prompt_set == "all" and chosen == (None,) * 4

    def take_part(self, every: Sequence[T]) -> tuple[T, ...]:
        """What of the jobs or prompts belongs to the chosen part; all without one."""
        if self.part is None:
            return tuple(every)
        k, n = self.part
        return tuple(every[k - 1 :: n])


def refuse_lone_part(choices: VerifyOptions) -> None:
    """Raises RecipeError for a part that would be kept nowhere."""
    if choices.part and not choices.results:
        raise RecipeError(
            "--part: what it draws is put together with the other parts; name a folder for it with --results"
        )


def parse_part(text: str) -> tuple[int, int]:
    """`2/3` as (2, 3). Raises ValueError for what is none."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ValueError(f"expected a part such as 1/3, got {text!r}")
    return int(k), int(n)


def refuse_source_options(choices: VerifyOptions) -> None:
    """Raises RecipeError for choices that would have no effect."""
    chosen = {
        "--model": choices.model,
        "--prompts": choices.prompts,
        "--seeds": choices.seeds,
        "--limit": choices.limit,
        "--budget": choices.budget,
        "--results": choices.results,
        "--part": choices.part,
    }
    given = [name for name, value in chosen.items() if value is not None] + ["--prompt-set"] * (
        choices.prompt_set != "all"
    )
    if given:
        raise RecipeError(
            f"{', '.join(given)}: says how the artifact is compared with its pipeline; add --source, or leave it out"
        )


def override_prompts(recipe: Recipe, choices: VerifyOptions) -> Recipe:
    """The recipe with the prompts, seeds and budget of the command line. Raises RecipeError for a file without prompts, and for a
    budget that is no time."""
    changes: dict[str, Any] = {} if choices.seeds is None else {"seeds": choices.seeds}
    if choices.budget is not None:
        try:
            parse_duration(choices.budget)
        except ValueError as e:
            raise RecipeError(f"--budget {e}") from e
        changes["budget"] = choices.budget
    elif not choices.is_complete:
        changes["budget"] = "full"
    if choices.prompts is not None:
        changes["prompts"] = read_prompts(choices.prompts)
    return recipe.model_copy(update={"verify": recipe.verify.model_copy(update=changes)})
