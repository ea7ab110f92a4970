"""Whether variants skip what they promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime.manifest import Cost
from ..passes.captured_graph import CapturedGraph
from ..plan import PlanSet
from .count import Census, check_skips, count_costs, module_flops


def count_and_check(
    denoiser: Any, planned: PlanSet, groups: Mapping[str, Sequence[CapturedGraph]]
) -> tuple[dict[str, Census], dict[str, Cost]]:
    """Graph -> its census, and graph -> its cost. Raises ExportError for a variant that does not skip what it promises."""
    censuses, costs = count_costs(groups)
    check_variant_costs(denoiser, planned, costs)
    return censuses, costs


def check_variant_costs(denoiser: Any, planned: PlanSet, costs: dict[str, Cost]) -> None:
    """Holds each variant's counted FLOPs against those of the modules that it should skip."""
    if len(planned.variants) == 1:
        return
    inside = module_flops(denoiser.module, denoiser.args)
    for variant in planned.variants[1:]:
        skipped = {site for site, action in variant.actions if action not in ("compute", "pass")}
        # attention without its scores still computes its values
        marks = [m for m in planned.marks if m.name in skipped and m.part == "output"]
        paths = {path for mark in marks for path in mark.modules}
        check_skips(costs["full"], costs[variant.name], variant.name, sum(inside.get(p, 0) for p in paths))


def recount(
    before: Mapping[str, Sequence[CapturedGraph]],
    after: Mapping[str, Sequence[CapturedGraph]],
    counted: tuple[dict[str, Census], dict[str, Cost]],
) -> tuple[dict[str, Census], dict[str, Cost]]:
    """What was `counted` of `before`, for the graphs of `after`: those that are the same are not counted again."""
    known = {id(g) for group in before.values() for g in group}
    fresh = {name: [g for g in group if id(g) not in known] for name, group in after.items()}
    censuses, costs = count_costs(fresh)
    censuses, costs = {**counted[0], **censuses}, {**counted[1], **costs}
    names = [g.name for group in after.values() for g in group]
    return {n: censuses[n] for n in names}, {n: costs[n] for n in names}
