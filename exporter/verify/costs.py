"""Costs: what an evaluation and a picture cost on this machine, timed before a comparison begins."""

from __future__ import annotations

from collections.abc import Collection

from .bfloat16 import has_bfloat16_products
from .budget import Costs, PictureJob, count_opening_steps
from .reference import EagerReference
from .replayer import ArtifactReplayer

WIDENED_BFLOAT16 = 1.5
"""Of an evaluation in eager bfloat16 whose products are taken in float32, in evaluations of eager float32."""


def measure_costs(replayer: ArtifactReplayer, reference: EagerReference, job: PictureJob) -> Costs:
    """What things cost here: variants that have not run yet are run, and eager makes one evaluation. What runs once for a
    picture is taken to cost eager as many times more as an evaluation does."""
    plans = replayer.artifact.plans
    variants = {name for plan in plans.values() for name in plan.variants()}
    first = next(iter(plans.values()))
    call = replayer.trace(*job, first, 1)[0]
    _, ms = reference.evaluate(call)
    for plan in plans.values():
        if not variant_seconds(replayer, plan.variants()).keys() >= set(plan.variants()):
            replayer.trace(*job, plan, count_opening_steps(plan))
    seconds = variant_seconds(replayer, variants)
    once = sum(s for name, s in replayer.graph_seconds.items() if name.partition(".call")[0] not in variants)
    eager_once = once * max(1.0, ms / 1e3 / max(seconds.values()))
    return Costs(seconds, ms / 1e3, once, eager_once, ms / 1e3 * bfloat16_factor())


def variant_seconds(replayer: ArtifactReplayer, variants: Collection[str]) -> dict[str, float]:
    """Variant -> seconds of its graphs, all calls of an evaluation together, of those that have run."""
    found: dict[str, float] = {}
    for graph, seconds in replayer.graph_seconds.items():
        name = graph.partition(".call")[0]
        if name in variants:
            found[name] = found.get(name, 0.0) + seconds
    return found


def bfloat16_factor() -> float:
    """How much longer eager takes in bfloat16 than in float32, roughly."""
    return 1.0 if has_bfloat16_products() else WIDENED_BFLOAT16
