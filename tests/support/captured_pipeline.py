"""A pipeline of the slim runtime whose graphs are the captured ones, run as they are: everything but the compiler, in
seconds. What compiling changes is tested with real artifacts."""

from __future__ import annotations

from pathlib import Path

import torch

from prebake.exporter.package import folder as package
from prebake.exporter.package.folder import StoredWeights
from prebake.exporter.package.manifest import describe_artifact
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.pipeline import prepare
from prebake.exporter.prepared_export import PreparedExport
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import Recipe
from prebake.runtime.artifact import Artifact, BoundGraph, read_plans
from prebake.runtime.contract import Contract
from prebake.runtime.manifest import Graph
from prebake.runtime.pipeline import Pipeline
from prebake.runtime.replay import tabulate_plan

CPU = torch.device("cpu")


def uncompiled(recipe: Recipe, folder: Path) -> Pipeline:
    """The recipe's artifact as `load` would return it. Plans and tokenizers lie in `folder`."""
    return opened(prepared(recipe), folder)


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
    graphs = {g.name: bound(g, captured(prepared)[g.name]) for g in manifest.graphs}
    plans = read_plans(folder, manifest)
    tables = {n: tabulate_plan(p, CPU, manifest.pipeline["timestep_scale"]) for n, p in plans.items()}
    return Pipeline(Artifact(folder, manifest, CPU, {}, graphs, plans, tables))


def captured(prepared: PreparedExport) -> dict[str, CapturedGraph]:
    return {g.name: g for group in prepared.graphs.values() for g in group}


def bound(graph: Graph, captured: CapturedGraph) -> BoundGraph:
    """The graph under its own call contract."""

    def run(flat: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t.clone() for t in captured.gm(*flat)]

    return BoundGraph(graph, run, Contract(graph, CPU))  # pyright: ignore[reportArgumentType]
