"""Checked prompts: those whose pictures can be judged, by the checker that comes with their model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..load.source import EMBEDDED_MODELS


@dataclass(frozen=True)
class CheckedPrompts:
    """Prompts whose pictures can be judged, each drawn with its index as the seed. `exact` gives the share, 0..1, of the
    images [H, W, 3] that show all that their prompt says."""

    prompts: tuple[str, ...]
    exact: Callable[[list[np.ndarray], list[str]], float]


def checked_prompts(model: str) -> CheckedPrompts | None:
    """The accuracy prompts and the checker that come with a model, or None."""
    if model not in EMBEDDED_MODELS:
        return None
    from ..shapes import read_prompt_set
    from ..shapes.checker import accuracy

    return CheckedPrompts(tuple(read_prompt_set("full")), lambda images, texts: accuracy(images, texts)["exact"])
