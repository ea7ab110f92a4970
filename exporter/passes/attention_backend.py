"""Which of torch's kernels a denoiser's attention runs by on a GPU: `attention.backend` of a recipe.

    before  o = aten.scaled_dot_product_attention(q, k, v)
    after   o = cudnn(q, k, v)

The operator asks torch at each call which kernel to take. Compiled code does not: while it is traced, the operator becomes
one kernel's own, by the switches of `torch.nn.attention.sdpa_kernel` at that moment, and the package calls that kernel from
then on (`torchgen/gen_aoti_c_shim.py`: without the dispatcher). So the functions below, which set the switches around the
operator, choose for good, and a graph that has them says in its fingerprint which it chose.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...runtime.errors import ExportError
from .captured_graph import CapturedGraph

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def cudnn(*args: Any, **kwargs: Any) -> Tensor:
    """cuDNN's fused attention: bfloat16 or float16."""
    return _call_kernel(SDPBackend.CUDNN_ATTENTION, args, kwargs)


def flash(*args: Any, **kwargs: Any) -> Tensor:
    """FlashAttention 2, as it is in torch: bfloat16 or float16, no mask."""
    return _call_kernel(SDPBackend.FLASH_ATTENTION, args, kwargs)


def efficient(*args: Any, **kwargs: Any) -> Tensor:
    """CUTLASS's memory-efficient attention, of any floating dtype."""
    return _call_kernel(SDPBackend.EFFICIENT_ATTENTION, args, kwargs)


def math(*args: Any, **kwargs: Any) -> Tensor:
    """Two matrix products and a softmax, for the compiler."""
    return _call_kernel(SDPBackend.MATH, args, kwargs)


def _call_kernel(kernel: SDPBackend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with sdpa_kernel(kernel):
        return SDPA(*args, **kwargs)


KERNELS: dict[str, Callable[..., Tensor]] = {k.__name__: k for k in (cudnn, flash, efficient, math)}


def set_attention_backend(graph: CapturedGraph, backend: str) -> CapturedGraph:
    """The graph with every attention by that kernel; "sdpa" = by the one that torch prefers where it is compiled."""
    if backend == "sdpa":
        return graph
    gm = fx.GraphModule(graph.gm, copy.deepcopy(graph.gm.graph))
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        node.target = KERNELS[backend]
    gm.recompile()
    return replace(graph, gm=gm)


def refuse_attention(graph: CapturedGraph) -> None:
    """Raises ExportError where the kernel that an attention is to run by cannot run it on this GPU, with torch's reason. The
    graph lies on the GPU."""
    able = {
        cudnn: cuda.can_use_cudnn_attention,
        flash: cuda.can_use_flash_attention,
        efficient: cuda.can_use_efficient_attention,
    }
    for node in graph.gm.graph.nodes:
        if node.target not in able:
            continue
        given = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        parameters = sdpa_parameters(*given[0], **given[1])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            can = able[node.target](parameters, True)
        if not can:
            q = parameters.query
            raise ExportError(
                f"graph {graph.name!r}: attention.backend {node.target.__name__!r} cannot run {node.name}, {list(q.shape)} in "
                f"{str(q.dtype).removeprefix('torch.')}: {find_reason([str(w.message) for w in said])}; set attention.backend=sdpa"
            )


def sdpa_parameters(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> cuda.SDPAParams:
    """The operator's arguments as torch's own questions take them; the scale is in none."""
    return cuda.SDPAParams(q, k, v, mask, dropout, causal, enable_gqa)


def find_reason(said: list[str]) -> str:
    """The first of torch's warnings that says why, and not that: `Flash attention kernel not used because:`."""
    whys = (line.partition(" (Triggered internally")[0].strip() for line in said)
    return next(
        (why.rstrip(".") for why in whys if why and not why.endswith("because:")), "this torch has no such kernel"
    )
