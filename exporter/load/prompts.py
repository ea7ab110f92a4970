"""The prompts that a recipe is verified with."""

from __future__ import annotations

from ..recipe.resolve import Recipe
from .source import EMBEDDED_MODELS

DIVERSE_PROMPTS = (
    "a photograph of a red fox in fresh snow, morning light",
    "an isometric drawing of a small harbour town, ink and watercolour",
    "a shop window at night with the word OPEN in neon letters",
    "three glass bottles on a wooden table, one green, one blue, one clear",
)


def picture_prompts(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's prompts; where it names none, eight of the embedded models' own, or four diverse ones for another model."""
    if recipe.verify.prompts:
        return recipe.verify.prompts
    if recipe.model.id not in EMBEDDED_MODELS:
        return DIVERSE_PROMPTS
    from ..shapes import read_prompt_set

    return (*read_prompt_set("full")[:4], *read_prompt_set("underspecified")[:4])
