"""Gaps: sentences on what a recipe asks for and a comparison cannot say, and on what was measured and decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...runtime.manifest import Manifest
from ...runtime.plan import Plan
from ..recipe.resolve import Recipe
from .comparison import Comparison
from .verdicts import is_cache_gated


def comparison_gaps(
    manifest: Manifest, recipe: Recipe, plans: Mapping[str, Plan], comparison: Comparison
) -> tuple[str, ...]:
    """What was not compared, and what has no verdict."""
    return (
        *budget_gaps(recipe, plans, comparison),
        *loss_gaps(comparison),
        *cache_gaps(manifest, recipe, plans, comparison),
    )


def budget_gaps(recipe: Recipe, plans: Mapping[str, Plan], comparison: Comparison) -> Iterator[str]:
    """What there was no time for, or nobody asked for."""
    workload = comparison.workload
    if workload and not workload.is_whole:
        yield (
            f"not everything was compared within verify.budget = {recipe.verify.budget}: {workload.describe()}; "
            "`prebake verify --source --budget full` compares all"
        )
    if sizes := sorted({plan.size for plan in plans.values() if plan.size}):
        yield f"at {', '.join(sizes)} the first evaluations were held to the recipe, and no pictures: they are drawn at the default size"
    if workload and workload.traced:
        yield "pictures were not held to the recipe: one picture in eager takes longer than verify.budget"
    elif not comparison.pictures:
        yield "pictures and evaluations were not held to the recipe: its own prompts were not drawn (--prompt-set accuracy)"
    if recipe.verify.prompt_accuracy_drop is not None and not comparison.exact:
        yield "prompt accuracy was not measured: the model has no checker, or its prompts were not asked for"


def loss_gaps(comparison: Comparison) -> Iterator[str]:
    """Where the unit of the thresholds could not be measured."""
    if comparison.loss.problem:
        yield f"{comparison.loss.problem}; evaluations were held to the spacing of its numbers, 2**-8, and pictures were not held to the recipe"


def cache_gaps(manifest: Manifest, recipe: Recipe, plans: Mapping[str, Plan], comparison: Comparison) -> Iterator[str]:
    """What of a cached plan is reported and decides nothing."""
    cached = [name for name, plan in plans.items() if plan.cache != "none"]
    if not cached:
        return
    if not is_cache_gated(manifest, recipe):
        yield (
            "what the cache loses is reported and not held to the recipe: the artifact has no calibration of this model; "
            "verify.cache_gate=always holds it to verify.cached_psnr_db"
        )
    records = [s for s in comparison.evaluation_records if s.plan in cached]
    replayed = any(
        error is not None and variant not in manifest.whole_graphs
        for s in records
        for error, (variant, _) in zip(s.compiled_errors, s.variant_ms, strict=False)
    )
    if records and not replayed:
        yield "the evaluations that the cache predicts were not held against the same ones in eager: what they read from sites is not known"
