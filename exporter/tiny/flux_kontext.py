"""FLUX Kontext in small: FLUX `dev`, whose tokens are joined by those of a picture."""

from __future__ import annotations

from diffusers import FluxKontextPipeline

from . import flux


def build(seed: int = 0) -> FluxKontextPipeline:
    """The components of tiny FLUX in the pipeline that takes a picture."""
    return FluxKontextPipeline(**flux.build(seed).components)
