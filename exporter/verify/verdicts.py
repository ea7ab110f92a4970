"""Verdicts: a comparison's figures, held to the recipe's thresholds.

In: a `Comparison`. Out: a `Verdict` for each plan and threshold, and sentences on what could not be judged.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ...runtime.manifest import Manifest, Verification
from ...runtime.plan import Plan
from ..recipe.resolve import Recipe
from .closeness import largest_error, mean_interval
from .comparison import Comparison, Sample, Trace
from .outcome import Outcome, Verdict


def judge_comparison(
    manifest: Manifest, recipe: Recipe, plans: Mapping[str, Plan], comparison: Comparison
) -> tuple[Verdict, ...]:
    """Every threshold of the recipe that this comparison can be held to."""
    verdicts = []
    for name, plan in plans.items():
        if samples := [s for s in comparison.pictures if s.plan == name]:
            verdicts.append(judge_psnr(recipe, plan, samples))
        if records := [s for s in comparison.evaluation_records if s.plan == name]:
            verdicts.append(judge_evaluations(manifest, recipe, plan, records))
        if name in comparison.exact and recipe.verify.prompt_accuracy_drop is not None:
            verdicts.append(judge_accuracy(recipe, plan, comparison))
    return tuple(verdicts)


def judge_psnr(recipe: Recipe, plan: Plan, samples: Sequence[Sample]) -> Verdict:
    """The mean over pictures of each picture's PSNR."""
    key, threshold = "psnr_db", recipe.verify.psnr_db
    way_out = "quantize fewer layers (quantize.exclude), take a wider precision, or lower verify.psnr_db"
    if plan.cache != "none" and recipe.verify.cached_psnr_db is not None:
        key, threshold = "cached_psnr_db", recipe.verify.cached_psnr_db
        way_out = "let the cache compute at more steps, or lower verify.cached_psnr_db"
    value = statistics.fmean(s.psnr_db for s in samples)
    return Verdict(plan.name, key, value, threshold, True, f"mean of {len(samples)} pictures", way_out)


def judge_evaluations(manifest: Manifest, recipe: Recipe, plan: Plan, samples: Sequence[Sample | Trace]) -> Verdict:
    """The largest error of an evaluation that computes everything; what a cache predicts is judged by its pictures."""
    whole = manifest.whole_graphs
    errors = [
        error
        for s in samples
        for error, (variant, _) in zip(s.evaluation_errors, s.variant_ms, strict=False)
        if variant in whole and error is not None
    ]
    value = largest_error(errors)
    way_out = "quantize fewer layers (quantize.exclude), take a wider precision, or raise verify.relative_error"
    over = f"largest of {len(errors)} evaluations that compute everything"
    return Verdict(plan.name, "relative_error", value, recipe.verify.relative_error, False, over, way_out)


def judge_accuracy(recipe: Recipe, plan: Plan, comparison: Comparison) -> Verdict:
    """Points that the plan loses of eager's accuracy."""
    drop = 100 * (comparison.exact_eager[plan.steps] - comparison.exact[plan.name])
    way_out = "quantize or cache less, or raise verify.prompt_accuracy_drop"
    over = f"points, on {comparison.checked_pictures} prompts"
    return Verdict(
        plan.name, "prompt_accuracy_drop", drop, recipe.verify.prompt_accuracy_drop or 0.0, False, over, way_out
    )


def describe_verification(outcome: Outcome) -> Verification | None:
    """What the verdict rests on, for the manifest."""
    if not outcome.comparison or not (workload := outcome.comparison.workload):
        return None
    made, asked = workload.count, workload.asked
    found = {name: [s.psnr_db for s in outcome.comparison.pictures if s.plan == name] for name in outcome.plans}
    return Verification(
        budget=outcome.recipe.verify.budget,
        pictures=(made.pictures, asked.pictures),
        evaluations=(made.evaluations, asked.evaluations),
        checked_prompts=(made.checked, asked.checked),
        psnr_db={name: interval for name, values in found.items() if (interval := mean_interval(values))},
    )


def comparison_gaps(recipe: Recipe, plans: Mapping[str, Plan], comparison: Comparison) -> tuple[str, ...]:
    """Sentences on what the recipe asks for and this comparison cannot say."""
    found = []
    workload = comparison.workload
    if workload and not workload.is_whole:
        found.append(
            f"not everything was compared within verify.budget = {recipe.verify.budget}: {workload.describe()}; "
            "`prebake verify --source --budget full` compares all"
        )
    if sizes := sorted({plan.size for plan in plans.values() if plan.size}):
        found.append(
            f"at {', '.join(sizes)} the first evaluations were held to the recipe, and no pictures: they are drawn at the default size"
        )
    if workload and workload.traced:
        found.append("PSNR was not held to the recipe: one picture in eager takes longer than verify.budget")
    elif not comparison.pictures:
        found.append(
            "PSNR and evaluations were not held to the recipe: its own prompts were not drawn (--prompt-set accuracy)"
        )
    if recipe.verify.prompt_accuracy_drop is not None and not comparison.exact:
        found.append("prompt accuracy was not measured: the model has no checker, or its prompts were not asked for")
    if any(plan.cache != "none" for plan in plans.values()):
        found.append(
            "the evaluations that the cache predicts are reported and have no threshold of their own; the cached plan's pictures have"
        )
    return tuple(found)
