"""Every variant of a denoiser as a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..passes.attention_dtype import attention_in
from ..passes.captured_graph import Captured
from ..plan import Planned, without_dead
from ..progress import Progress
from ..sites.actions import VariantModule
from ..sites.marks import Mark, Variant
from .capture import capture


def capture_variants(
    denoiser: Any, planned: Planned, progress: Progress, attention: str | None = None
) -> tuple[Planned, tuple[Captured, ...]]:
    """Every variant as a graph, its attention in the dtype of that name, None = as it is. Variants that read stored values go first: what none of them reads is not stored."""

    def captured(variant: Variant, marks: tuple[Mark, ...]) -> Captured:
        module = VariantModule(denoiser.module, marks, variant, denoiser.inputs)
        graph = capture(variant.name, module, module.examples(denoiser.args), module.inputs, module.outputs)
        return attention_in(graph, getattr(torch, attention)) if attention else graph

    readers = [v for v in planned.variants if v.having("combine")]
    for variant in readers:
        progress.doing(f"denoiser: {variant.name}, reads")
    read = [captured(v, planned.marks) for v in readers]
    stored = {s.name for g in read for s in g.inputs if "@" in s.name}
    used = {s.name for g in read for s in g.live_inputs()}
    dead = {name.partition("@")[0] for name in stored} - {name.partition("@")[0] for name in used}
    planned = replace(planned, marks=without_dead(planned.marks, frozenset(dead)))
    graphs = []
    for variant in planned.variants:
        progress.doing(f"denoiser: {variant.name}")
        again = dead or variant not in readers
        graphs.append(captured(variant, planned.marks) if again else read[readers.index(variant)])
    return planned, tuple(graphs)


def capture_others(components: tuple[Any, ...], progress: Progress) -> tuple[Captured, ...]:
    graphs = []
    for component in components:
        progress.doing(component.name)
        graphs.append(capture(component.name, component.module, component.args, component.inputs, component.outputs))
    return tuple(graphs)
