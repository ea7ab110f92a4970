"""Stable Diffusion XL, base and refiner: sizes as further inputs of the denoiser, and schedules that two models share.

`exporter/families/sdxl.py` writes `manifest.pipeline`, and takes its sizes from here where it needs some.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from ..call.arguments import describe_argument, real_number, real_number_or_none
from ..errors import RequestError
from ..replay import Tensors
from . import Family, ScheduleWindow, Settings

SIZE_ARGUMENTS = ("original_size", "crops_coords_top_left", "target_size")
SCORE_ARGUMENTS = ("aesthetic_score", "negative_aesthetic_score")
DEFAULT_SCORE, DEFAULT_NEGATIVE_SCORE = 6.0, 2.5
SizeNumbers = tuple[float, ...]


class SDXLSettings(Settings):
    """`scored`: the denoiser takes an aesthetic score in place of the target size, as the refiner does.
    `num_train_timesteps` are the scheduler's, of which `denoising_start` and `denoising_end` are fractions."""

    scored: bool
    num_train_timesteps: int = Field(ge=1, le=1_000_000)


class StableDiffusionXL(Family):
    """Family `sdxl`."""

    settings_type: ClassVar[type[Settings]] = SDXLSettings
    settings: SDXLSettings

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of diffusers' `__call__` that say what to draw, how large it is said to be, and which part of the
        schedule is taken."""
        sizes = [f"{prefix}{name}" for prefix in ("", "negative_") for name in size_arguments(self.settings.scored)]
        scores = SCORE_ARGUMENTS if self.settings.scored else ()
        start = ("denoising_start",) if self.settings.picture else ()
        return (*super().arguments, *sizes, *scores, *start, "denoising_end")

    def conditions(self, given: Mapping[str, Any], guidance_scale: float) -> list[Tensors]:
        """The denoiser's inputs that are equal at every step, one dict for each prompt: all have the same `time_ids` [1, 2, K].

        Without guidance both branches get the sizes that are not negative.
        """
        negative, positive = size_numbers(given, (self.height, self.width), self.settings.scored)
        rows = [negative if guidance_scale > 1 else positive, positive]
        ids = torch.tensor([rows], dtype=torch.float32, device=self._device)
        return [{**condition, "time_ids": ids} for condition in super().conditions(given, guidance_scale)]

    def window(self, given: Mapping[str, Any]) -> ScheduleWindow:
        """From `denoising_start` and to `denoising_end`, fractions of the schedule: base and refiner share one so."""
        names = ("denoising_start", "denoising_end")
        start, end = (real_number_or_none(name, given.get(name)) for name in names)
        for name, value in zip(names, (start, end), strict=True):
            if value is not None and not 0 < value < 1:
                raise RequestError(f"{name}: expected a number between 0 and 1, a part of the schedule, got {value!r}")
        if start is not None and end is not None and start >= end:
            raise RequestError(f"denoising_start: expected less than denoising_end, which is {end}, got {start}")
        return ScheduleWindow(*(None if part is None else self._timestep(part) for part in (start, end)))

    def _timestep(self, part: float) -> int:
        """Where that part of the schedule is done, as diffusers rounds it."""
        steps = self.settings.num_train_timesteps
        return round(steps - part * steps)


def size_arguments(scored: bool) -> tuple[str, ...]:
    """The sizes that the denoiser takes, by diffusers' arguments."""
    return SIZE_ARGUMENTS[:2] if scored else SIZE_ARGUMENTS


def size_numbers(given: Mapping[str, Any], usual: tuple[int, int], scored: bool) -> tuple[SizeNumbers, SizeNumbers]:
    """The numbers of `time_ids`, in pixels, for the negative branch and the other: (height, width, top, left, and
    height and width of the target, or the score). `usual` is the picture's own size.

    The negative branch is told the same as the other one unless the negative sizes are given, both of them, as in
    `StableDiffusionXLPipeline`; the crop of those is (0, 0) where it is not given. With a score each negative number
    stands for itself, as in `StableDiffusionXLImg2ImgPipeline`. Raises RequestError for what is no size.
    """
    original, crop = read_pair(given, "original_size", usual), read_pair(given, "crops_coords_top_left", (0, 0))
    negative_crop = read_pair(given, "negative_crops_coords_top_left", (0, 0))
    if scored:
        negative = read_pair(given, "negative_original_size", original)
        score = read_number(given, "aesthetic_score", DEFAULT_SCORE)
        negative_score = read_number(given, "negative_aesthetic_score", DEFAULT_NEGATIVE_SCORE)
        return (*negative, *negative_crop, negative_score), (*original, *crop, score)
    positive = (*original, *crop, *read_pair(given, "target_size", usual))
    names = ("negative_original_size", "negative_target_size")
    if not any(f"negative_{name}" in given for name in SIZE_ARGUMENTS):
        return positive, positive
    if lacking := [name for name in names if name not in given]:
        raise RequestError(
            f"{lacking[0]}: expected with the other negative sizes, got none; they have an effect together only"
        )
    return (*read_pair(given, names[0], usual), *negative_crop, *read_pair(given, names[1], usual)), positive


def read_pair(given: Mapping[str, Any], name: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    """The argument as two numbers, `usual` where it is not given."""
    value = given.get(name, usual)
    if not isinstance(value, (tuple, list, np.ndarray)) or len(value) != 2:
        raise RequestError(f"{name}: expected two numbers of pixels, down and across, got {describe_argument(value)}")
    return tuple(real_number(name, number) for number in value)


def read_number(given: Mapping[str, Any], name: str, usual: float) -> float:
    """The argument as a number, `usual` where it is not given."""
    return real_number(name, given.get(name, usual))
