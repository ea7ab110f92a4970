"""Whether variants skip what they promise."""

from __future__ import annotations

from typing import Any

from ...runtime.manifest import Cost
from ..plan import PlanSet
from .count import check_skips, module_flops


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
