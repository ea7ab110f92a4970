"""Lowering: captured graphs go in, all of an artifact at once (a backend may share between them), files come out.

A backend is a module here and one of the same name in `runtime/backends`, and nothing else: `compile.backend` names it, and
no other file knows it. What a module here has to offer is `Backend`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ...runtime.backends import backend_names as opened_names
from ...runtime.errors import ExportError
from ...runtime.extras import install_command

if TYPE_CHECKING:
    from torch import nn

    from ..passes.captured_graph import CapturedGraph, GraphPass
    from ..recipe.schema import Recipe

GraphGroups = Mapping[str, Sequence["CapturedGraph"]]
"""Component -> its graphs: several variants of the denoiser, one of every other component."""
CodeFiles = Mapping[str, bytes]
"""What a graph is compiled into: file name -> content."""
GraphCompiler = Callable[[str, "CapturedGraph", Callable[["CapturedGraph"], CodeFiles]], CodeFiles]
"""`made(component, graph, compiled)` is `compiled(graph)`, or what that gave before; it says which (`exporter/export_cache/store.py`)."""


class Backend(Protocol):
    """`config` is a recipe's `compile` table. `CHANNELS_LAST`: convolutions read their weights as N H W C, and would have to
    reorder others at every call. A module may also have `bind(folder, paths, bound)`: called when the weight files are there,
    for code that says where its constants lie. `bound` is graph -> {constant: key in the weight files}. And it may have
    `depends(config)`: what its code depends on besides graph, `config`, versions and `toolchain`, as `toolchain` has it, for
    the export cache; and `stand_in(config)`, a `timing.StandIn`: what its code calls in the place of operators of a graph, with
    `kernel_version(config)`, which changes with that code."""

    CHANNELS_LAST: bool

    def adapt_recipe(self, recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
        """The recipe as this backend can do it, asked before the model is loaded, and a sentence for each change. Raises
        RecipeError for what it cannot, and for options that it has not."""
        ...

    def quantize_layers(self, model: nn.Module, names: set[str], recipe: Recipe) -> None:
        """Makes the Linears of these names what the recipe's `quantize.method` says, in place: weights by row, activations
        by token as they come."""
        ...

    def list_passes(self, config: Any) -> tuple[GraphPass, ...]:
        """The passes over every graph before it is lowered, in order, asked once for all graphs of an artifact. The constants
        that they leave are what the artifact stores, and what the graph is bound to."""
        ...

    def lower(self, folder: Path, groups: GraphGroups, config: Any, made: GraphCompiler) -> dict[str, str]:
        """Writes the code of every graph under `folder`, and returns graph -> path there. What is compiled of one graph, of
        itself and `config` alone, is asked of `made`, which may know it already.

        Raises ExportError naming the graph that the backend cannot compile.
        """
        ...

    def has_batch_graphs(self, config: Any) -> bool:
        """Whether a denoiser's graph for several pictures is worth its compilation: not on a CPU, which has no unit to fill. There
        the graph for one is called for each, and a picture is to the bit what it is alone."""
        ...

    def reproducible(self, config: Any) -> bool:
        """Whether the same graph and toolchain give the same bytes again: not where kernels are chosen by their times."""
        ...

    def requires(self, recipe: Any) -> dict[str, Any]:
        """What the code needs of a machine, as fields of the manifest's `Requires`."""
        ...

    def toolchain(self, config: Any) -> dict[str, str]:
        """What else of this machine went into the code."""
        ...


def list_backends() -> tuple[str, ...]:
    """The backends that can be exported and opened, sorted; found by their files, none of them imported."""
    return tuple(sorted({m.name for m in pkgutil.iter_modules(__path__)} & set(opened_names())))


def load_backend(name: str) -> Backend:
    """The module of that name. Raises ExportError where a package that it needs is not installed."""
    if name not in list_backends():
        raise ExportError(
            f"compile.backend {name!r}: there is none of that name; there are {', '.join(list_backends())}"
        )
    try:
        return cast(Backend, importlib.import_module(f".{name}", __name__))
    except ModuleNotFoundError as e:
        if e.name is None:
            raise
        raise ExportError(
            f"compile.backend {name!r}: needs the package {e.name}, which is not installed; {install_command(e.name)}"
        ) from e
