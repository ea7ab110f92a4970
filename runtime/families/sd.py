"""Stable Diffusion 1 and 2: one text encoder, latents as the VAE has them, guidance between two prompts.

`exporter/families/sd.py` writes `manifest.pipeline`. There is nothing in it that the shared `Family` does not know.
"""

from __future__ import annotations

from . import Family


class StableDiffusion(Family):
    """Family `sd`."""
