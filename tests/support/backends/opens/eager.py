"""The other half: the stored graphs, run as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from prebake.runtime.backends import GraphModel, OpenContext
from prebake.runtime.manifest import Manifest, Requires


def problems(requires: Requires) -> Iterator[str]:
    if requires.packages["torch"] != torch.__version__:
        yield f"was exported with torch {requires.packages['torch']}, this is {torch.__version__}; export again"


def package_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    return iter(())


def open_models(opening: OpenContext) -> dict[str, GraphModel]:
    models: dict[str, GraphModel] = {}
    for graph in opening.manifest.graphs:
        module = torch.export.load(opening.folder / graph.package).module()
        bound = [tensor for _, tensor in sorted(opening.constants[graph.name].items())]
        models[graph.name] = lambda inputs, module=module, bound=bound: [t.clone() for t in module(*inputs, *bound)]
    return models
