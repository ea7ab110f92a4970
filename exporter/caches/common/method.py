"""The base of the tables of all cache methods: what the exporter asks of any of them, with what most of them answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...tables import RecipeTable


class CacheMethod(RecipeTable):
    """A table `[cache]` of a recipe. Its key `method` is the name of its file, where its policy `schedule` stands too."""

    if TYPE_CHECKING:
        method: Any  # a Literal of its own in every method

    @property
    def exact(self) -> bool:
        """Whether the decisions follow from the weights and the timesteps, with no calibration."""
        return False

    @property
    def needs_planes(self) -> bool:
        """Whether the denoiser must be built with `sites.guidance.add_planes`."""
        return False
