"""What a verification found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...runtime.plan import Plan
from ..recipe.resolve import Recipe
from .comparison import Comparison
from .golden import GoldenReplay


@dataclass(frozen=True)
class Verdict:
    """One figure of one plan, or of the artifact where `plan` is empty, against the recipe. A figure that is NaN never passes."""

    plan: str
    figure: str
    value: float
    threshold: float
    at_least: bool
    over: str
    way_out: str

    @property
    def passed(self) -> bool:
        return self.value >= self.threshold if self.at_least else self.value <= self.threshold

    @property
    def sentence(self) -> str:
        relation = "at least" if self.at_least else "at most"
        of = f"plan {self.plan!r}: " if self.plan else ""
        return f"{of}{self.figure} is {self.value:.4g} ({self.over}), expected {relation} {self.threshold:g}; {self.way_out}"


@dataclass(frozen=True)
class Outcome:
    """Everything that one verification found. `comparison` is None where only golden vectors were replayed."""

    recipe: Recipe
    plans: Mapping[str, Plan]
    golden: tuple[GoldenReplay, ...]
    comparison: Comparison | None = None
    verdicts: tuple[Verdict, ...] = ()
    not_measured: tuple[str, ...] = ()

    @property
    def missed(self) -> tuple[str, ...]:
        """A sentence for each figure that misses its threshold; empty if the artifact passes."""
        return (*(v.sentence for v in self.verdicts if not v.passed), *(p for g in self.golden for p in g.problems))
