"""Prompt choice: which prompts and seeds a verification draws.

The recipe says it, or a file and a limit of the caller's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...runtime.errors import RecipeError
from ...runtime.manifest import Manifest
from ..load.prompts import picture_prompts
from ..recipe.resolve import Recipe
from .budget import PictureJob
from .checked_prompts import CheckedPrompts, checked_prompts


def read_prompts(path: Path) -> tuple[str, ...]:
    """The file's lines that are not empty: one prompt each."""
    try:
        prompts = tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    except OSError as e:
        raise RecipeError(f"--prompts {path}: expected a text file with one prompt a line, but {e.strerror}") from e
    except ValueError as e:
        raise RecipeError(f"--prompts {path}: expected text in UTF-8, but {e}; save it so") from e
    if not prompts:
        raise RecipeError(f"--prompts {path}: expected one prompt a line, the file has none")
    return prompts


def picture_jobs(recipe: Recipe, limit: int | None = None) -> tuple[PictureJob, ...]:
    """The recipe's prompts with each of its seeds."""
    return tuple((prompt, seed) for seed in range(recipe.verify.seeds) for prompt in picture_prompts(recipe)[:limit])


def threshold_prompts(recipe: Recipe, manifest: Manifest) -> CheckedPrompts | None:
    """The checked prompts of an export: only as many as the recipe says, since all of them take minutes."""
    if recipe.verify.prompt_accuracy_drop is None:
        return None
    return limit_prompts(checked_prompts(manifest.source.model), recipe.verify.accuracy_prompts)


def limit_prompts(checked: CheckedPrompts | None, limit: int | None) -> CheckedPrompts | None:
    return checked and replace(checked, prompts=checked.prompts[:limit])
