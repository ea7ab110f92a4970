"""Compiled variants without an artifact around them: what tests and benchmarks of plans need.

In: a denoiser and a plan's variants. Out: the same things that a runtime drives, through the exporter's own capture and
lowering and the runtime's own backend. Equal graphs are compiled once, whatever plans they belong to.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.backends.aoti import NativeModel, open_model
from ...runtime.manifest import Graph
from ...runtime.replay import DenoiserVariant
from ...runtime.storage.unpack import read_members, unpack_members
from ..calibrators.eager_replay import ZERO_COST, describe_sites
from ..capture.variants import capture_variants
from ..lower import aoti
from ..passes.captured_graph import CapturedGraph, run_passes
from ..plan import PlanSet
from ..progress import open_progress
from ..recipe.resolve import Compile
from ..sites.component import Component

__all__ = ["VariantCompiler", "describe_sites"]


class VariantCompiler:
    """Compiles in a temporary folder, which lives as long as this object."""

    def __init__(self, config: Compile | None = None) -> None:
        self.config = config or Compile(threads=1)
        self.passes = aoti.list_passes(self.config)
        self.folder = tempfile.TemporaryDirectory(prefix="prebake-compiled-")
        self.models: dict[tuple[str, ...], NativeModel] = {}

    def variants(
        self, denoiser: Component, planned: PlanSet, kind: str = ""
    ) -> tuple[PlanSet, dict[str, DenoiserVariant]]:
        """The plan as an export would keep it, and its variants by name. `kind` tells denoisers of equal code apart."""
        with open_progress("quiet") as quiet:
            planned, graphs = capture_variants(denoiser, planned, quiet)
        variants = {}
        for actions, graph in zip(planned.variants, graphs, strict=True):
            described = Graph(
                name=graph.name,
                package="",
                inputs=graph.inputs,
                outputs=graph.outputs,
                stores=tuple(m.name for m in actions.stored_marks(planned.marks)),
                combines=actions.combined_sites(planned.marks),
                constants={},
                cost=ZERO_COST,
            )
            variants[graph.name] = DenoiserVariant(described, call_by_name(self.model(graph, kind), graph))
        return planned, variants

    def model(self, graph: CapturedGraph, kind: str = "") -> NativeModel:
        """The graph as machine code, its constants bound."""
        graph = run_passes(graph, self.passes)
        key = (kind, graph.gm.code, *(f"{s.shape} {s.dtype}" for s in graph.inputs))
        if key not in self.models:
            build = Path(self.folder.name) / "build"
            package = Path(self.folder.name) / f"{len(self.models)}.pt2"
            target = aoti.kernel_target(self.config)
            files = aoti.compile_graph(graph, aoti.compile_flags(self.config), build, target=target)
            aoti.write_package(package, {graph.name: files})
            data = package.read_bytes()
            with unpack_members(
                read_members(package.name, data), hashlib.sha256(data).hexdigest(), Path(self.folder.name)
            ) as libraries:
                model = open_model(libraries[graph.name], torch.device("cpu"))
            model.bind({name: t.detach() for name, t in graph.constants().items()})
            self.models[key] = model
        return self.models[key]


def call_by_name(model: NativeModel, graph: CapturedGraph):
    """The model, called by the names of the graph's inputs and outputs."""
    names = [spec.name for spec in graph.outputs]

    def call(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(names, model([named[spec.name] for spec in graph.inputs]), strict=True))

    return call
