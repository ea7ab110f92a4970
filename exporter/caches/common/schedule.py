"""What policies are given and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...sites.marks import Action, Mark


@dataclass(frozen=True)
class Trajectory:
    """One entry per evaluation of the denoiser: the scheduler's timestep and the user's step it belongs to (a Heun step
    has two). `sigmas` are the scheduler's own, terminal one included, and () where it has none."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What one evaluation does: the action of every marked site, and the coefficients of those that combine, newest slot
    first. A site that is not named computes."""

    actions: Mapping[str, Action] = field(default_factory=dict)
    coefficients: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def reuse(cls, *marks: Mark) -> Decision:
        """Each of these sites returns its newest stored value."""
        return cls({m.name: "combine" for m in marks}, {m.name: (1.0,) + (0.0,) * (m.slots - 1) for m in marks})


@dataclass(frozen=True)
class Schedule:
    """A policy's answer: the sites it uses and one decision per evaluation."""

    marks: tuple[Mark, ...]
    decisions: tuple[Decision, ...]
