"""Capture: a module and example tensors come in, a pruned functional GraphModule with its contract comes out.

The graph is functional (no in-place ops), takes and returns flat tensors, and holds nothing that its outputs do not
need. `lower/` may rely on that, and `cost.py` counts on it. torch.export runs non-strict: the site hooks of `sites.py`
are ordinary Python to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError, first_line
from ...runtime.manifest import TensorSpec
from ...runtime.sizes.size_range import SizeRange
from ..passes.captured_graph import CapturedGraph, GraphPass, output_nodes
from ..passes.fold import fold_constants
from ..passes.functionalize import functionalize_graph
from ..passes.prune import prune_dead_code
from ..passes.register_constants import register_constants
from ..private_torch import example_number, trace_sparingly
from ..sites.component import Axes
from .ranges import WAY_OUT, export_shapes

CAPTURE_PASSES: tuple[GraphPass, ...] = (
    register_constants,  # first: the others know tensors as parameters and buffers
    prune_dead_code,  # before folding: a variant's skipped modules must not be folded
    fold_constants,
    prune_dead_code,  # what only fed a folded value
)


def capture_graph(
    name: str,
    module: nn.Module,
    args: tuple[Tensor, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    sizes: SizeRange | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> CapturedGraph:
    """`module(*args)` as a graph, for all of `sizes`, which inputs and outputs follow by `axes`. Raises ExportError naming the graph when
    torch.export cannot trace it."""
    axes = axes or {}
    of_inputs = [axes.get(n, {}) for n in inputs]
    with torch.no_grad(), trace_sparingly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shapes: Any = export_shapes(args, of_inputs, sizes) if sizes else None
            program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
            gm = program.module()
            if not functionalize_graph(gm):
                gm = program.run_decompositions({}).module()
        except ExportError:
            raise
        except Exception as e:
            way_out = f"; {WAY_OUT}" if sizes else ""
            raise ExportError(
                f"graph {name!r}: torch.export could not trace it ({type(e).__name__}: {first_line(e)}){way_out}"
            ) from e
        results = [n.meta["val"] for n in output_nodes(gm)]
        if strided := [n for n, t in zip(outputs, results, strict=True) if not t.is_contiguous()]:
            raise ExportError(
                f"graph {name!r}: outputs {', '.join(strided)} are not contiguous, which the call contract asks for"
            )
        for apply in CAPTURE_PASSES:
            gm = apply(gm)
    graph = CapturedGraph(name, gm, args, tensor_specs(inputs, args, axes), tensor_specs(outputs, results, axes), sizes)
    refuse_other_axes(graph)
    return graph


def tensor_specs(
    names: Sequence[str], tensors: Sequence[Any], axes: Mapping[str, Axes] | None = None
) -> tuple[TensorSpec, ...]:
    """Names, shapes and dtypes side by side; both lists must be of one length."""
    return tuple(
        TensorSpec(
            name=n,
            shape=tuple(example_number(size) for size in t.shape),
            dtype=str(t.dtype).removeprefix("torch."),
            axes={axis: str(d) for axis, d in (axes or {}).get(n, {}).items()},
        )
        for n, t in zip(names, tensors, strict=True)
    )


def refuse_other_axes(graph: CapturedGraph) -> None:
    """Raises ExportError where tracing made a constant of a dimension that follows the size, or let another one vary."""
    placeholders = graph.gm.graph.find_nodes(op="placeholder")
    values = [n.meta["val"] for n in (*placeholders, *output_nodes(graph.gm))]
    for spec, value in zip((*graph.inputs, *graph.outputs), values, strict=True):
        varying = {axis for axis, size in enumerate(value.shape) if not isinstance(size, int)}
        if varying != set(spec.axes):
            raise ExportError(
                f"graph {graph.name!r}: of {spec.name!r} the dimensions {sorted(spec.axes)} are to follow the size, and in the traced graph "
                f"{sorted(varying)} do; {WAY_OUT}"
            )
