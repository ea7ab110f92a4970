"""CogVideoX: one text encoder, latents [t, C, h, w] of a video, guidance between two prompts.

`exporter/families/cogvideox.py` writes `manifest.pipeline`. What is its own: it makes frames.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from ..bounds import Pixels
from . import Family, Settings


class CogVideoXSettings(Settings):
    """`latents_shape` is that of a video, [t, C, h, w]."""

    latents_shape: Annotated[tuple[Pixels, ...], Field(min_length=4, max_length=4)]


class CogVideoX(Family):
    """Family `cogvideox`."""

    settings_type: ClassVar[type[Settings]] = CogVideoXSettings
    output_kind = "frames"
