"""Compiled variants for tests: the exporter's own capture and lowering, the runtime's own backend, no whole artifact.

A variant is compiled once per process: plans are data, so methods that do the same at the same sites share it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peers import Run, inputs_of
from torch import Tensor

from prebake.exporter.component import Component
from prebake.exporter.lower import aoti
from prebake.exporter.pipeline import capture_variants
from prebake.exporter.plan import Planned
from prebake.exporter.progress import progress
from prebake.exporter.recipe import Compile
from prebake.runtime.backends.aoti import open_model
from prebake.runtime.backends.unpack import unpacked
from prebake.runtime.manifest import Cost, Graph, Site
from prebake.runtime.plan import Plan
from prebake.runtime.replay import Variant, replay, tables_on

MADE: dict[object, Variant] = {}
FOLDER = tempfile.TemporaryDirectory(prefix="prebake-compiled-")


def compiled(kind: str, component: Component, planned: Planned) -> tuple[Planned, dict[str, Variant]]:
    """The plan as an export would keep it, and its variants compiled. `kind` names the (seeded) component."""
    with progress("quiet") as quiet:
        planned, graphs = capture_variants(component, planned, quiet)
    variants = {}
    for variant, graph in zip(planned.variants, graphs, strict=True):
        key = (kind, planned.marks, variant.actions)
        if key not in MADE:
            MADE[key] = open_variant(graph, variant, planned, len(MADE))
        variants[variant.name] = MADE[key]
    return planned, variants


def open_variant(graph, variant, planned: Planned, number: int) -> Variant:
    package = Path(FOLDER.name) / f"{number}.pt2"
    aoti.write_package(package, {graph.name: aoti.compile_graph(graph, aoti.flags(Compile(threads=1)))})
    data = package.read_bytes()
    with unpacked(package.name, data, hashlib.sha256(data).hexdigest(), Path(FOLDER.name)) as libraries:
        model = open_model(libraries[graph.name], torch.device("cpu"))
    model.bind({n: t.detach().contiguous() for n, t in graph.constants().items()})
    described = Graph(
        name=graph.name, package=package.name, inputs=graph.inputs, outputs=graph.outputs,
        stores=tuple(m.name for m in variant.storing(planned.marks)), combines=variant.having("combine"),
        constants={}, cost=Cost(flops=0, ops=0, constants=0, constants_bytes=0),
    )  # fmt: skip

    def call(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        results = model([named[spec.name] for spec in graph.inputs])
        return dict(zip((spec.name for spec in graph.outputs), results, strict=True))

    return Variant(described, call)


def compiled_run(
    kind: str, component: Component, planned: Planned, chosen: Plan, latents: Tensor, *, timestep_scale: float = 1.0
) -> Run:
    """The plan, replayed with compiled variants."""
    planned, variants = compiled(kind, component, planned)
    sites = {m.name: Site(name=m.name, slots=m.slots, tensors=m.tensors) for m in planned.marks}
    run = Run()

    def keep(e: int, output: Tensor, _: Tensor) -> None:
        run.outputs.append(output)

    run.latents = replay(
        tables_on(chosen, latents.device, timestep_scale), variants, sites, inputs_of(component), latents,
        on_evaluation=keep,
    )  # fmt: skip
    return run
