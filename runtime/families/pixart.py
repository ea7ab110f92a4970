"""PixArt-Sigma and PixArt-Alpha: T5 alone, whose mask the denoiser takes too, and guidance between two prompts.

`exporter/families/pixart.py` writes `manifest.pipeline`. There is nothing in it that the shared `Family` does not know.
"""

from __future__ import annotations

from . import Family


class PixArt(Family):
    """Family `pixart`. `prompt_attention_mask` and `negative_prompt_attention_mask` are arguments beside the embeddings."""
