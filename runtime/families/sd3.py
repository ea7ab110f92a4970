"""Stable Diffusion 3 and 3.5: three text encoders, of which T5 may be left out; guidance between two prompts.

`exporter/families/sd3.py` writes `manifest.pipeline`.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..bounds import MAX_TOKENS
from . import Family, Settings


class SD3Settings(Settings):
    """`max_sequence_length` is T5's, in tokens: where an artifact has no T5, its zeros are as long."""

    max_sequence_length: int = Field(ge=1, le=MAX_TOKENS)


class StableDiffusion3(Family):
    """Family `sd3`."""

    settings_type: ClassVar[type[Settings]] = SD3Settings
    settings: SD3Settings

    @property
    def max_sequence_length(self) -> int:
        """Tokens of T5's longest prompt."""
        return self.settings.max_sequence_length
