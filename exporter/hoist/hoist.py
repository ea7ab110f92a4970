"""The pass: the variants of a denoiser come in, their graphs without what can be computed before the loop come out, and the graphs
that compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.manifest import TensorSpec
from ..capture.capture import tensor_specs
from ..passes.captured_graph import CapturedGraph
from .cut import choose_values, find_heavy
from .evaluations import stack_evaluations
from .split import build_graph, pass_values
from .values import Level, ValueTable

PROLOGUE, STEP = "prologue", "step"
"""The graphs' names, and before a colon those of their outputs."""


@dataclass(frozen=True)
class HoistedGraphs:
    """`prologue` runs once for a prompt, `step` for many evaluations at once; None where there is nothing for them. `variants` take
    what they give."""

    variants: tuple[CapturedGraph, ...]
    prologue: CapturedGraph | None = None
    step: CapturedGraph | None = None

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        """All of them, the variants first: weights keep the names that they have there."""
        return (*self.variants, *(g for g in (self.prologue, self.step) if g))


def hoist_graphs(variants: Sequence[CapturedGraph], evaluations: int) -> HoistedGraphs:
    """The variants' graphs hoisted; the step's graph takes the timesteps of so many `evaluations`, [E, *] of what the denoiser takes."""
    table = ValueTable(variants)
    heavy = find_heavy(table)
    at_once = name_values(table, PROLOGUE, choose_values(table, Level.PROMPT, heavy, evaluations))
    by_step = name_values(table, STEP, choose_values(table, Level.STEP, heavy, evaluations))
    hoisted = tuple(pass_values(g, table, {**at_once, **by_step}) for g in variants)
    read = {spec.name for g in hoisted for spec in g.inputs}
    by_step = {place: spec for place, spec in by_step.items() if spec.name in read}
    step = build_graph(STEP, table, by_step, at_once) if by_step else None
    read |= {spec.name for spec in (step.inputs if step else ())}
    at_once = {place: spec for place, spec in at_once.items() if spec.name in read}
    return HoistedGraphs(
        hoisted,
        build_graph(PROLOGUE, table, at_once, {}) if at_once else None,
        stack_evaluations(step, evaluations) if step else None,
    )


def name_values(table: ValueTable, graph: str, places: Sequence[int]) -> dict[int, TensorSpec]:
    """Place -> `prologue:0`, `prologue:1`, ... with the value's shape and dtype."""
    names = tuple(f"{graph}:{i}" for i in range(len(places)))
    return dict(zip(places, tensor_specs(names, [table.values[p].tensor for p in places]), strict=True))
