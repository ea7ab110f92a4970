"""Verdicts: the measurements of a comparison against the recipe's thresholds.

In: a `Comparison`. Out: a `Verdict` for each plan and threshold. What cannot be judged, `gaps.py` says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from ...runtime.manifest import Manifest, Verification
from ...runtime.plan import Plan
from ..caches.common.calibration import CALIBRATION_FILE
from ..load.source import EMBEDDED_MODELS
from ..recipe.resolve import Recipe
from .closeness import largest_error, mean_interval, smallest_psnr_db
from .comparison import Comparison, Sample, Trace
from .loss import LEAST_PICTURE_LOSS, picture_loss
from .outcome import Outcome, Verdict

COARSE_WAY_OUT = "quantize fewer layers (quantize.exclude), take a wider precision, or raise verify.{key}"


def judge_comparison(
    manifest: Manifest, recipe: Recipe, plans: Mapping[str, Plan], comparison: Comparison
) -> tuple[Verdict, ...]:
    """Every threshold of the recipe that this comparison can be held to."""
    verdicts: list[Verdict] = []
    for name, plan in plans.items():
        samples = [s for s in comparison.pictures if s.plan == name]
        if plan.cache == "none":
            verdicts += judge_pictures(recipe, plan, samples, comparison)
        elif is_cache_gated(manifest, recipe):
            verdicts += judge_cache(recipe, plan, samples)
        verdicts += judge_evaluations(recipe, plan, relative_errors(plan, comparison))
        if name in comparison.exact and recipe.verify.prompt_accuracy_drop is not None:
            verdicts.append(judge_accuracy(recipe, plan, comparison))
    return tuple(verdicts)


def is_cache_gated(manifest: Manifest, recipe: Recipe) -> bool:
    """Whether what a cache loses is held to the recipe: for a model that the artifact has a calibration of, or that brings its own
    checker. Of other models nobody has tried what a cache may lose."""
    calibrated = CALIBRATION_FILE in {entry.path for entry in manifest.files}
    return recipe.verify.cache_gate == "always" or calibrated or manifest.source.model in EMBEDDED_MODELS


def relative_errors(plan: Plan, comparison: Comparison) -> list[float]:
    """The errors of the plan's evaluations against the same ones in eager, in units of what eager bfloat16 loses there."""
    records: list[Sample | Trace] = [s for s in comparison.evaluation_records if s.plan == plan.name]
    return [
        error / comparison.loss.at(plan.size, evaluation.timestep)
        for record in records
        for error, evaluation in zip(record.compiled_errors, plan.evaluations, strict=False)
        if error is not None
    ]


def judge_evaluations(recipe: Recipe, plan: Plan, errors: Sequence[float]) -> Iterator[Verdict]:
    """Mean and worst, of all evaluations that eager repeated as the artifact makes them."""
    if not errors:
        return
    for key, what, value in (
        ("evaluation_error", "mean", statistics.fmean(errors)),
        ("worst_evaluation_error", "worst", largest_error(errors)),
    ):
        over = f"{what} of {len(errors)} evaluations, bfloat16 = 1"
        yield Verdict(plan.name, key, value, getattr(recipe.verify, key), False, over, COARSE_WAY_OUT.format(key=key))


def judge_pictures(recipe: Recipe, plan: Plan, samples: Sequence[Sample], comparison: Comparison) -> Iterator[Verdict]:
    """Mean and worst, of pictures without cache, beside those of eager bfloat16's."""
    rounded = [picture_loss(db) for db in comparison.loss.pictures_db.get(plan.steps, ())]
    if not samples or not rounded:
        return
    found = [picture_loss(s.psnr_db) for s in samples]
    for key, what, value, unit in (
        ("picture_error", "mean", statistics.fmean(found), statistics.fmean(rounded)),
        ("worst_picture_error", "worst", largest_error(found), largest_error(rounded)),
    ):
        unit = LEAST_PICTURE_LOSS if math.isnan(unit) else max(unit, LEAST_PICTURE_LOSS)
        over = f"{what} of {len(found)} pictures, bfloat16 = 1"
        way_out = COARSE_WAY_OUT.format(key=key)
        yield Verdict(plan.name, key, value / unit, getattr(recipe.verify, key), False, over, way_out)


def judge_cache(recipe: Recipe, plan: Plan, samples: Sequence[Sample]) -> Iterator[Verdict]:
    """Mean and worst, of a cached plan's pictures beside the artifact's own without cache."""
    found = [s.psnr_db if s.uncached_psnr_db is None else s.uncached_psnr_db for s in samples]
    if not found:
        return
    for key, what, value in (
        ("cached_psnr_db", "mean", statistics.fmean(found)),
        ("worst_cached_psnr_db", "worst", smallest_psnr_db(found)),
    ):
        threshold = getattr(recipe.verify, key)
        if threshold is not None:
            way_out = f"let the cache compute at more steps, or lower verify.{key}"
            over = f"{what} of {len(found)} pictures"
            yield Verdict(plan.name, key, value, threshold, True, over, way_out)


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
