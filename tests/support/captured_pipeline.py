"""A pipeline of the slim runtime whose graphs are the captured ones, run as they are: everything but the compiler, in
seconds. What compiling changes is tested with real artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from prebake.exporter import pipeline
from prebake.exporter.capture import variants
from prebake.exporter.package import folder as package
from prebake.exporter.package.folder import StoredWeights
from prebake.exporter.package.manifest import describe_artifact
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.pipeline import prepare
from prebake.exporter.prepared_export import PreparedExport
from prebake.exporter.progress import Progress, open_progress
from prebake.exporter.recipe.resolve import Recipe
from prebake.exporter.sites.component import Component
from prebake.runtime.artifact import Artifact, BoundGraph, read_plans
from prebake.runtime.contract import graph_contract
from prebake.runtime.manifest import Graph, Manifest
from prebake.runtime.pipeline import Pipeline
from prebake.runtime.replay import tabulate_plan
from support.known_layouts import layout_of

CPU = torch.device("cpu")


def uncompiled(recipe: Recipe, folder: Path) -> Pipeline:
    """The recipe's artifact as `load` would return it. Plans and tokenizers lie in `folder`.

    Text encoders and the VAE are captured once for all recipes that differ in the denoiser's part alone: most of the time goes
    there, and nobody rewrites these graphs. A denoiser's layout is discovered once for each structure, too.
    """
    with (
        mock.patch.object(variants, "capture_components", remember_components(recipe)),
        mock.patch.object(pipeline, "discover_layout", layout_of),
    ):
        return opened(prepared(recipe), folder)


_components: dict[str, tuple[CapturedGraph, ...]] = {}


def remember_components(recipe: Recipe) -> Callable[..., tuple[CapturedGraph, ...]]:
    """`capture_components` of a recipe's text encoders and VAE, for a tiny model what it gave before."""
    parts = recipe.model_dump_json(
        exclude={"name", "description", "cache", "guidance", "verify", "sampler", "attention"}
    )
    key = f"{parts} {recipe.sampler.image_to_image}"
    capture = variants.capture_components

    def capture_once(components: Sequence[Component], progress: Progress) -> tuple[CapturedGraph, ...]:
        if not recipe.model.id.startswith("tiny:"):  # a folder may hold other weights by now
            return capture(components, progress)
        if key not in _components:
            _components[key] = capture(components, progress)
        return _components[key]

    return capture_once


def prepared(recipe: Recipe) -> PreparedExport:
    with open_progress("quiet") as quiet:
        return prepare(recipe, quiet)


def opened(prepared: PreparedExport, folder: Path) -> Pipeline:
    package.write_plans(folder, prepared.planned.plans)
    prepared.part.write_files(folder, prepared.layout, prepared.planned)
    manifest = describe_artifact(
        folder,
        prepared,
        StoredWeights({name: {key: key for key in g.constants()} for name, g in captured(prepared).items()}, ()),
        dict.fromkeys(captured(prepared), ""),
    )
    graphs = {g.name: bound(g, captured(prepared)[g.name], manifest) for g in manifest.graphs}
    plans = read_plans(folder, manifest)
    tables = {n: tabulate_plan(p, CPU, manifest.pipeline["timestep_scale"]) for n, p in plans.items()}
    return Pipeline(Artifact(folder, manifest, CPU, {}, graphs, plans, tables))


def captured(prepared: PreparedExport) -> dict[str, CapturedGraph]:
    return {g.name: g for group in prepared.graphs.values() for g in group}


def bound(graph: Graph, captured: CapturedGraph, manifest: Manifest) -> BoundGraph:
    """The graph under its own call contract."""

    def run(flat: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t.clone() for t in captured.gm(*flat)]

    return BoundGraph(graph, run, graph_contract(graph, CPU, manifest.range))  # pyright: ignore[reportArgumentType]
