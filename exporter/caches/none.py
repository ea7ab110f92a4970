"""No cache."""

from __future__ import annotations

from typing import Literal

from ..tables import Table


class NoCache(Table):
    """Every step computes everything."""

    method: Literal["none"] = "none"
