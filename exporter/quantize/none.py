"""No quantization."""

from __future__ import annotations

from typing import Literal

from .method import QuantizeMethod


class NoQuantize(QuantizeMethod):
    """Weights keep the denoiser's precision."""

    method: Literal["none"] = "none"
    """Picks this table."""
