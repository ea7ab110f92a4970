"""What a captured graph costs, counted on the graph itself, and whether a variant skips what its plan promises."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from ..runtime.errors import ExportError
from ..runtime.manifest import Cost
from .capture import Captured

FLOP_FORMULAS = {torch.ops.aten._int_mm: lambda a, b, *rest, **kwargs: mm_flop(a, b)}
ATTENTION_OPS = ("scaled_dot_product_attention", "_scaled_dot_product")


def cost(graph: Captured) -> Cost:
    """FLOPs (2 per multiply-add), ATen calls, and the constants that the graph reads, each once."""
    constants = {t.data_ptr(): t.nbytes for t in graph.constants().values()}
    return Cost(
        flops=flops(graph),
        ops=sum(n.op == "call_function" for n in graph.gm.graph.nodes),
        constants=len(constants),
        constants_bytes=sum(constants.values()),
    )


def flops(graph: Captured) -> int:
    """Multiply-adds x 2 of matrix products, convolutions and attention in one run, counted on fake tensors."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        args = [fake.from_tensor(t) for t in graph.args]
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            graph.gm(*args)
    return counter.get_total_flops()


def module_flops(module: nn.Module, args: tuple[Tensor, ...]) -> dict[str, int]:
    """FLOPs inside each submodule in one run of `module(*args)`, by its path."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = [fake.from_tensor(t) for t in args]
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            module(*inputs)
    root = f"{type(module).__name__}."
    return {path.removeprefix(root): sum(ops.values()) for path, ops in counter.get_flop_counts().items()}


def attention_ops(graph: Captured) -> int:
    """How many attention calls the graph has."""
    return sum(
        n.op == "call_function" and any(op in str(n.target) for op in ATTENTION_OPS) for n in graph.gm.graph.nodes
    )


def check_skips(full: Cost, variant: Cost, name: str, skipped_flops: int) -> None:
    """Raises ExportError unless the variant really is `skipped_flops` cheaper than the full graph (within 1%).

    This is the guard against a skip that the compiler silently undid: what is promised is counted inside the skipped
    modules, what is held against it is counted on the pruned graph.
    """
    if variant.flops >= full.flops:
        raise ExportError(
            f"variant {name!r} skips nothing: {variant.flops:,} FLOPs, the full graph has {full.flops:,}; "
            "its sites feed values that are computed anyway, so choose other sites or no cache"
        )
    promised = full.flops - skipped_flops
    if variant.flops > promised + full.flops // 100:
        raise ExportError(
            f"variant {name!r} should cost {promised:,} FLOPs after skipping its sites, its graph has {variant.flops:,}; "
            "something outside the sites reads what they should have skipped"
        )
