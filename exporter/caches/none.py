"""No cache."""

from __future__ import annotations

from typing import Literal

from ..tables import RecipeTable


class NoCache(RecipeTable):
    """Every step computes everything."""

    method: Literal["none"] = "none"
