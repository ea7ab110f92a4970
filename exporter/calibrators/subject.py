"""What is calibrated, and one trajectory of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..plan.sampler import SchedulerTable
from ..sites.component import Component
from ..sites.layout import Layout


@dataclass(frozen=True)
class CalibrationRun:
    """One trajectory to watch: what to draw and from which noise. `inputs` are the denoiser's constant ones."""

    label: str
    inputs: Mapping[str, Tensor]
    latents: Tensor
    noise: tuple[Tensor, ...]


@dataclass(frozen=True)
class CalibrationSubject:
    """The model as it is run: the denoiser, what it offers, the sampler's table, and how timesteps reach the denoiser."""

    denoiser: Component
    layout: Layout
    table: SchedulerTable
    timestep_scale: float
