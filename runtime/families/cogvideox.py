"""CogVideoX: one text encoder, latents [t, C, h, w] of a video, guidance between two prompts.

`exporter/families/cogvideox.py` writes `manifest.pipeline`. What is its own: it makes frames.
"""

from __future__ import annotations

from . import Family


class CogVideoX(Family):
    """Family `cogvideox`."""

    output_kind = "frames"
