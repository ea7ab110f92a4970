"""Every variant of a denoiser as a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..passes.attention_dtype import cast_attention
from ..passes.captured_graph import CapturedGraph
from ..plan import PlanSet, drop_dead_tensors
from ..progress import Progress
from ..sites.actions import VariantModule
from ..sites.component import Axes, Component
from ..sites.marks import Mark, Variant
from .capture import capture_graph
from .ranges import find_output_axes


def capture_variants(
    denoiser: Component, planned: PlanSet, progress: Progress, attention: str | None = None
) -> tuple[PlanSet, tuple[CapturedGraph, ...]]:
    """Every variant as a graph, its attention in the dtype of that name, None = as it is. Variants that read stored values go first: what none of them reads is not stored."""

    axes = find_site_axes(denoiser, planned.marks) if denoiser.range else {}

    def captured(variant: Variant, marks: tuple[Mark, ...]) -> CapturedGraph:
        module = VariantModule(denoiser.module, marks, variant, denoiser.inputs)
        graph = capture_graph(
            f"{variant.name}{denoiser.label}",
            module,
            module.examples(denoiser.args, denoiser.batch),
            module.inputs,
            module.outputs,
            denoiser.range,
            {n: axes.get(n.partition("@")[0], {}) for n in (*module.inputs, *module.outputs)},
        )
        return cast_attention(graph, getattr(torch, attention)) if attention else graph

    readers = [v for v in planned.variants if v.sites_with("combine")]
    for variant in readers:
        progress.announce(f"denoiser: {variant.name}{denoiser.label}, reads")
    read = [captured(v, planned.marks) for v in readers]
    stored = {s.name for g in read for s in g.inputs if "@" in s.name}
    used = {s.name for g in read for s in g.live_inputs()}
    dead = {name.partition("@")[0] for name in stored} - {name.partition("@")[0] for name in used}
    planned = replace(planned, marks=drop_dead_tensors(planned.marks, frozenset(dead)))
    graphs = []
    for variant in planned.variants:
        progress.announce(f"denoiser: {variant.name}{denoiser.label}")
        again = dead or variant not in readers
        graphs.append(captured(variant, planned.marks) if again else read[readers.index(variant)])
    return planned, tuple(graphs)


def find_site_axes(denoiser: Component, marks: tuple[Mark, ...]) -> dict[str, Axes]:
    """How the denoiser's inputs, its output and what its sites store follow the size, by name."""
    assert denoiser.range is not None
    everything = VariantModule(denoiser.module, marks, Variant("shapes", ()), denoiser.inputs)
    of_inputs = [denoiser.axes.get(n, {}) for n in denoiser.inputs]
    found = find_output_axes(denoiser.name, everything, denoiser.args, of_inputs, everything.outputs, denoiser.range)
    return {**denoiser.axes, **found}


def capture_part(
    denoisers: Sequence[Component],
    others: Sequence[Component],
    planned: PlanSet,
    progress: Progress,
    attention: str | None,
) -> tuple[PlanSet, dict[str, tuple[CapturedGraph, ...]]]:
    """Component -> its graphs: every variant of the denoiser for each of its calls, sizes and batches, and those of every other
    component. And the plans, with what the variants of the first store."""
    stored, graphs = None, dict[str, tuple[CapturedGraph, ...]]()
    for denoiser in denoisers:
        told, variants = capture_variants(denoiser, planned, progress, attention)
        stored = stored or told
        graphs[denoiser.name] = graphs.get(denoiser.name, ()) + variants
    for component, graph in zip(others, capture_components(others, progress), strict=True):
        graphs[component.name] = (*graphs.get(component.name, ()), graph)
    return stored or planned, graphs


def capture_components(components: Sequence[Component], progress: Progress) -> tuple[CapturedGraph, ...]:
    graphs = []
    for component in components:
        name = f"{component.name}{component.label}"
        progress.announce(name)
        axes = dict(component.axes)
        if component.range:
            of_inputs = [axes.get(n, {}) for n in component.inputs]
            outputs = component.outputs
            axes |= find_output_axes(name, component.module, component.args, of_inputs, outputs, component.range)
        graphs.append(
            capture_graph(
                name, component.module, component.args, component.inputs, component.outputs, component.range, axes
            )
        )
    return tuple(graphs)
