"""Loss: what eager bfloat16 loses against the reference, at the artifact's own inputs and on the same pictures.

It is the unit of the gate. A model of any size is computed in bfloat16 by whoever has no artifact of it; so an error is large or
small beside what they lose, and not beside a number that fits some models. In: evaluations and pictures whose exact values are known,
and the reference's pipeline, which is cast in place, since two copies of a large one take too much memory. Out: `Bfloat16Loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..progress import Progress
from .bfloat16 import eager_bfloat16
from .closeness import psnr_db, relative_error
from .reference import EagerReference
from .replayer import GraphCall

BFLOAT16_SPACING = 2.0**-8  # of the numbers from 1 to 2
LEAST_LOSS = BFLOAT16_SPACING / 16  # of an evaluation, so that none is measured by nothing
LEAST_PICTURE_LOSS = 12**-0.5 / 255  # what rounding to 8 bits does to a picture


@dataclass(frozen=True)
class KnownEvaluation:
    """One evaluation that computes everything, with the reference's output for the artifact's inputs."""

    size: str | None
    timestep: float
    call: GraphCall
    exact: Tensor


@dataclass(frozen=True)
class KnownPicture:
    """The reference's picture."""

    prompt: str
    seed: int
    steps: int
    image: Tensor


@dataclass(frozen=True)
class Bfloat16Loss:
    """What eager bfloat16 loses: of an evaluation, by size, at some timesteps; of pictures, by number of steps, their PSNR in dB."""

    evaluations: Mapping[str | None, Sequence[tuple[float, float]]] = field(default_factory=dict)
    pictures_db: Mapping[int, Sequence[float]] = field(default_factory=dict)
    problem: str = ""

    def at(self, size: str | None, timestep: float) -> float:
        """The relative error of an evaluation at that timestep, between those that were measured on the straight line. Where none was, the
        spacing of bfloat16's numbers stands in."""
        points = sorted(self.evaluations.get(size) or self.evaluations.get(None, ()))
        if not points:
            return BFLOAT16_SPACING
        timesteps, losses = zip(*points, strict=True)
        return max(LEAST_LOSS, float(np.interp(timestep, timesteps, losses)))


def picture_loss(db: float) -> float:
    """The root of the mean squared error, of the values 0..1, of a picture of that PSNR."""
    return 10 ** (-db / 20)


def measure_loss(
    reference: EagerReference,
    evaluations: Sequence[KnownEvaluation],
    pictures: Sequence[KnownPicture],
    progress: Progress,
) -> Bfloat16Loss:
    """Eager bfloat16 at the same inputs, and on the same prompts and seeds. The reference is bfloat16 from then on.

    A pipeline that torch cannot run in bfloat16 here has no loss, and `problem` says why.
    """
    if not evaluations and not pictures:
        return Bfloat16Loss()
    progress.announce(f"eager bfloat16: {len(evaluations)} evaluations, {len(pictures)} pictures")
    found: dict[str | None, list[tuple[float, float]]] = {}
    drawn: dict[int, list[float]] = {}
    try:
        reference.cast_to_bfloat16()
        with eager_bfloat16():
            for known in evaluations:
                theirs, _ = reference.evaluate(known.call)
                found.setdefault(known.size, []).append((known.timestep, relative_error(theirs, known.exact)))
            for picture in pictures:
                image = reference.draw(picture.prompt, picture.seed, picture.steps).image
                drawn.setdefault(picture.steps, []).append(psnr_db(image, picture.image))
    except (RuntimeError, TypeError, ValueError) as e:
        return Bfloat16Loss(problem=f"eager bfloat16 does not run here: {str(e).splitlines()[0]}")
    return Bfloat16Loss({size: average_points(points) for size, points in found.items()}, drawn)


def average_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point a timestep."""
    by_timestep: dict[float, list[float]] = {}
    for timestep, loss in points:
        by_timestep.setdefault(timestep, []).append(loss)
    return [(timestep, sum(losses) / len(losses)) for timestep, losses in by_timestep.items()]
