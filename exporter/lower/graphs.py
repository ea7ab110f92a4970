"""The graphs of an export as its backend lowers them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..passes.attention_backend import set_attention_backend
from ..passes.captured_graph import run_passes

if TYPE_CHECKING:
    from ..prepared_export import PreparedExport


def rewrite_graphs(prepared: PreparedExport) -> PreparedExport:
    """The export with the denoiser's attention by the kernel that the recipe names, and all graphs as the backend takes them."""
    attention, config = prepared.recipe.attention.backend, prepared.recipe.compile
    graphs, passes = {}, prepared.backend.list_passes(config)
    for component, group in prepared.graphs.items():
        chosen = [set_attention_backend(g, attention) if component.startswith("denoiser") else g for g in group]
        graphs[component] = tuple(run_passes(g, passes) for g in chosen)
    return replace(prepared, graphs=graphs)
