"""What a call keeps while it draws: for each thread its own, since one pipeline may be called from many."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import RequestError
from ..finite import refuse_nonfinite
from .arguments import real_number


@dataclass
class DrawnPicture:
    """The picture that a call draws: its steps, the guidance of the step to come and of the first, and what else the denoiser
    is given then."""

    steps: int
    guidance_scale: float
    first_guidance_scale: float
    inputs: dict[str, torch.Tensor]


class CallState(threading.local):
    """`interrupt`: the call has been told to stop. `picture` is the one that is drawn now, `last` the one of before."""

    def __init__(self) -> None:
        self.interrupt = False
        self.picture: DrawnPicture | None = None
        self.last: DrawnPicture | None = None

    @contextmanager
    def track_picture(self, steps: int, guidance_scale: float, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
        """Inside, that picture is drawn. A callback may call the pipeline again; after that its own goes on."""
        outer, picture = self.picture, DrawnPicture(steps, guidance_scale, guidance_scale, inputs)
        self.picture = self.last = picture
        try:
            yield
        finally:
            self.picture, self.last = outer, outer or replace(picture, inputs={})

    def change_guidance(self, value: Any, *, by_step: bool) -> None:
        """Another guidance for the steps to come; 1 or less is none. Raises RequestError where it would have no effect, as
        where the family's pipeline does not read it `by_step`."""
        if not by_step:
            raise RequestError(
                "_guidance_scale: this model is told its guidance before the first step; give it to the call"
            )
        picture, scale = self._change_input("guidance_scale", value, lowest=1.0)
        if scale > 1 and picture.first_guidance_scale <= 1:
            raise RequestError(
                f"_guidance_scale={scale:g}: the call began without guidance, so without a negative prompt; begin with more than 1"
            )
        picture.guidance_scale = scale

    def change_rescale(self, value: Any) -> None:
        """Another rescale of the guidance for the steps to come."""
        self._change_input("guidance_rescale", value, lowest=-math.inf)

    def _change_input(self, name: str, value: Any, *, lowest: float) -> tuple[DrawnPicture, float]:
        """The picture whose input `name` is now the number, and the number. Its old tensor may be that of other pictures."""
        number, picture = real_number(f"_{name}", value), self.picture
        refuse_nonfinite(f"_{name}", number)
        if picture is None:
            raise RequestError(f"_{name}: can be set in a call's callback alone; give the call {name}")
        if name not in picture.inputs:
            raise RequestError(f"_{name}: a step of this artifact takes no {name}, so setting it would change nothing")
        picture.inputs[name] = torch.full_like(picture.inputs[name], max(number, lowest))
        return picture, number
