"""FLUX.1 Kontext: FLUX, whose denoiser also takes `image_latents`, the picture that is to be changed.

`exporter/families/flux_kontext.py` writes `manifest.pipeline`: its `picture` has the role of a reference, which is all that
is particular here.
"""

from __future__ import annotations

from .flux import Flux


class FluxKontext(Flux):
    """Family `flux_kontext`."""
