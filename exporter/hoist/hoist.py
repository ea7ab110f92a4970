"""The pass: the variants of a denoiser come in, their graphs without what can be computed before the loop come out, and the graphs
that compute it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...runtime.manifest import PROLOGUE, STEP, TensorSpec
from ..capture.capture import tensor_specs
from ..cost.variants import recount
from ..passes.captured_graph import CapturedGraph
from ..plan import PlanSet
from ..sites.component import Component
from .cut import choose_values, count_flops
from .evaluations import stack_evaluations
from .split import build_graph, pass_values
from .values import Level, ValueTable

if TYPE_CHECKING:
    from ..prepared_export import PreparedExport

MAX_EVALUATIONS = 64
"""How many the step's graph takes at once: a product of so many rows is still bound by reading its weights."""


@dataclass(frozen=True)
class HoistedGraphs:
    """`prologue` runs once for a prompt, `step` for many evaluations at once; None where there is nothing for them. `variants` take
    what they give."""

    variants: tuple[CapturedGraph, ...]
    prologue: CapturedGraph | None = None
    step: CapturedGraph | None = None

    @property
    def before_loop(self) -> tuple[CapturedGraph, ...]:
        """What there is of prologue and step."""
        return tuple(g for g in (self.prologue, self.step) if g)


def hoist_export(prepared: PreparedExport, denoisers: Sequence[Component]) -> PreparedExport:
    """The export with its denoiser's graphs hoisted, and counted again; as it is where the recipe says no, and where a denoiser is exported
    alone, whose inputs have names of their own."""
    if not prepared.recipe.compile.hoist or not prepared.part.HOISTS:
        return prepared
    graphs = hoist_denoisers(denoisers, prepared.planned, prepared.graphs)
    censuses, costs = recount(prepared.graphs, graphs, (prepared.censuses, prepared.costs))
    return replace(prepared, graphs=graphs, censuses=censuses, costs=costs)


def hoist_denoisers(
    denoisers: Sequence[Component], planned: PlanSet, graphs: dict[str, tuple[CapturedGraph, ...]]
) -> dict[str, tuple[CapturedGraph, ...]]:
    """Component -> its graphs, those of the denoiser hoisted for each of its sizes and batches by itself."""
    evaluations = min(max(len(plan.evaluations) for plan in planned.plans), MAX_EVALUATIONS)
    variants: list[CapturedGraph] = []
    before_loop: list[CapturedGraph] = []
    for denoiser in denoisers:
        names = {f"{variant.name}{denoiser.label}" for variant in planned.variants}
        found = hoist_graphs([g for g in graphs[denoiser.name] if g.name in names], evaluations)
        variants += found.variants
        before_loop += (replace(g, name=f"{g.name}{denoiser.label}") for g in found.before_loop)
    return {**graphs, denoisers[0].name: (*variants, *before_loop)}


def hoist_graphs(variants: Sequence[CapturedGraph], evaluations: int) -> HoistedGraphs:
    """The variants' graphs hoisted; the step's graph takes the timesteps of so many `evaluations`, [E, *] of what the denoiser takes."""
    table = ValueTable(variants)
    flops = count_flops(table)
    at_once = name_values(table, PROLOGUE, choose_values(table, Level.PROMPT, flops, evaluations))
    by_step = name_values(table, STEP, choose_values(table, Level.STEP, flops, evaluations))
    hoisted = tuple(pass_values(g, table, {**at_once, **by_step}) for g in variants)
    read = {spec.name for g in hoisted for spec in g.inputs}
    by_step = {place: spec for place, spec in by_step.items() if spec.name in read}
    step = build_graph(STEP, table, by_step, at_once) if by_step else None
    read |= {spec.name for spec in (step.inputs if step else ())}
    at_once = {place: spec for place, spec in at_once.items() if spec.name in read}
    prologue = build_graph(PROLOGUE, table, at_once, {}) if at_once else None
    examples = compute_outputs(prologue) if prologue else {}
    if step:
        step = set_examples(step, examples)
        examples |= compute_outputs(step)
    return HoistedGraphs(
        tuple(set_examples(g, examples) for g in hoisted),
        prologue,
        stack_evaluations(step, evaluations) if step else None,
    )


def compute_outputs(graph: CapturedGraph) -> dict[str, Tensor]:
    """What the graph makes of its examples, by name."""
    with torch.no_grad():
        return dict(zip((spec.name for spec in graph.outputs), graph.gm(*graph.args), strict=True))


def set_examples(graph: CapturedGraph, examples: Mapping[str, Tensor]) -> CapturedGraph:
    """The graph with `examples` as its inputs of these names: zeros, as modulation, would let nothing through."""
    args = tuple(examples.get(s.name, t) for s, t in zip(graph.inputs, graph.args, strict=True))
    return replace(graph, args=args) if examples.keys() & {s.name for s in graph.inputs} else graph


def name_values(table: ValueTable, graph: str, places: Sequence[int]) -> dict[int, TensorSpec]:
    """Place -> `prologue:0`, `prologue:1`, ... with the value's shape and dtype."""
    names = tuple(f"{graph}:{i}" for i in range(len(places)))
    return dict(zip(places, tensor_specs(names, [table.values[p].tensor for p in places]), strict=True))
