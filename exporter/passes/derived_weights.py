"""Weights made from others, in the order in which a backend's code reads them: packed, or transposed.

    before  y = linear(x, weight)           in every variant of a denoiser
    after   y = x @ weight_t                with one weight_t for all of them

Variants of a model share its weights, and go on sharing what is made from them, as long as one `DerivedWeights` makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from .fold import find_tensor
from .fx_tools import store_buffer


class DerivedWeights:
    """What was made for the graphs so far, with the weights that it was made from, so that their addresses stay their own."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def store(self, gm: fx.GraphModule, name: str, suffix: str, make: Callable[[Tensor], Tensor]) -> str:
        """The name of the buffer of `gm` that holds `make` of its tensor `name`. A suffix stands for one `make`."""
        weight = find_tensor(gm, name)
        key = (weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride(), suffix)
        if key not in self._made:
            self._made[key] = (weight, make(weight))
        store_buffer(gm, f"{name}_{suffix}", self._made[key][1])
        return f"{name}_{suffix}"
