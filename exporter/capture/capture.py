"""Capture: a module and example tensors come in, a pruned functional GraphModule with its contract comes out.

The graph is functional (no in-place ops), takes and returns flat tensors, and holds nothing that its outputs do not
need. `lower/` may rely on that, and `cost.py` counts on it. torch.export runs non-strict: the site hooks of `sites.py`
are ordinary Python to it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError, first_line
from ...runtime.manifest import TensorSpec
from ..passes.captured_graph import CapturedGraph, GraphPass, output_nodes
from ..passes.fold import fold_constants
from ..passes.functionalize import functionalize_graph
from ..passes.prune import prune_dead_code
from ..passes.register_constants import register_constants
from ..private_torch import trace_sparingly

CAPTURE_PASSES: tuple[GraphPass, ...] = (
    register_constants,  # first: the others know tensors as parameters and buffers
    prune_dead_code,  # before folding: a variant's skipped modules must not be folded
    fold_constants,
    prune_dead_code,  # what only fed a folded value
)


def capture_graph(
    name: str, module: nn.Module, args: tuple[Tensor, ...], inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> CapturedGraph:
    """`module(*args)` as a graph. Raises ExportError naming the graph when torch.export cannot trace it."""
    with torch.no_grad(), trace_sparingly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(module, args, strict=False)
            gm = program.module()
            if not functionalize_graph(gm):
                gm = program.run_decompositions({}).module()
        except Exception as e:
            raise ExportError(
                f"graph {name!r}: torch.export could not trace it ({type(e).__name__}: {first_line(e)})"
            ) from e
        results = [n.meta["val"] for n in output_nodes(gm)]
        if strided := [n for n, t in zip(outputs, results, strict=True) if not t.is_contiguous()]:
            raise ExportError(
                f"graph {name!r}: outputs {', '.join(strided)} are not contiguous, which the call contract asks for"
            )
        for apply in CAPTURE_PASSES:
            gm = apply(gm)
    return CapturedGraph(name, gm, args, tensor_specs(inputs, args), tensor_specs(outputs, results))


def tensor_specs(names: tuple[str, ...], tensors) -> tuple[TensorSpec, ...]:
    """Names, shapes and dtypes side by side; both lists must be of one length."""
    return tuple(
        TensorSpec(name=n, shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
        for n, t in zip(names, tensors, strict=True)
    )
