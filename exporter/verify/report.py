"""Report: what a verification found, as JSON for programs, with the pictures of `picture_sheet.py`.

An `Outcome` of `verify.py` comes in; `outcome_tables.py` shows people the same. Units are in the names; every mean says over how many; what was not measured is
listed. Times belong to the machine that is named beside them, so a report is never part of what an artifact's hashes cover.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...runtime.check.machine import cpu_name
from ...runtime.errors import RecipeError
from ...runtime.manifest import Manifest
from ...runtime.plan import Plan
from . import picture_sheet as sheet
from .closeness import covered_share, largest_error, mean_interval, smallest_psnr_db
from .comparison import Comparison, Sample, Trace
from .outcome import Outcome
from .verdicts import relative_errors

SCHEMA_VERSION = 1
VERIFY_METHOD_NOTES = {
    "psnr_db": "mean over pictures of each picture's PSNR against eager float32, same prompt, seed and steps, before rounding to 8 bits; of a video over all its frames; 120 = equal",
    "ssim": "mean over pictures of scikit-image's structural_similarity, per colour channel, 7 x 7 windows; of a video the mean over its frames",
    "relative_error": "L2 norm of the difference over L2 norm of eager's output; eager's denoiser is given the artifact's own inputs, on the pictures of seed 0",
    "compiled_error": "the same against the same variant in eager at the same stored values, so without what a cache loses; `of_bfloat16` divides it by what eager bfloat16 loses at that timestep, measured at some and interpolated between them",
    "bfloat16_psnr_db": "the PSNR of pictures of eager bfloat16 against eager float32, same prompts, seeds and steps, from the same noise",
    "uncached_psnr_db": "the PSNR of a cached plan's pictures against the artifact's own without cache",
    "psnr_db_interval_95": "95 % confidence interval of the mean over all pictures, by Student's t over those that were drawn",
    "covered_share_95": "the share of all evaluations that is, with 95 % confidence, no worse than the worst that was compared",
    "latents_relative_error": "the same of the final latents, each from its own trajectory",
    "accuracy_percent": "share of pictures that show everything that their prompt says, by the model's checker",
    "times": "medians over pictures, of a plan's evaluations the mean within each; eager and artifact took turns in one process on the machine named here",
}


def write_verify_report(folder: Path, manifest: Manifest, outcome: Outcome) -> None:
    """`verify.json` and, if pictures were drawn, `verify.png`. Raises RecipeError where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "verify.json").write_text(format_json(describe_outcome(manifest, outcome)), "utf-8")
        if outcome.comparison and outcome.comparison.rows:
            plans = sheet.sheet_plans(manifest, outcome.plans)
            sheet.save_sheet(outcome.comparison.rows, plans, folder / "verify.png")
    except OSError as e:
        raise RecipeError(
            f"{folder}: the report cannot be written ({e.strerror}); choose another folder with --output"
        ) from e


def format_json(described: dict[str, Any]) -> str:
    """Sorted keys, two spaces, a final newline; numbers that JSON does not have become the strings "nan", "inf", "-inf"."""
    return json.dumps(replace_nonfinite(described), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def replace_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def describe_outcome(manifest: Manifest, outcome: Outcome) -> dict[str, Any]:
    """The report as plain values. `eager_figures`, `variant_figures` and most of `plans` are absent where eager was not run."""
    described: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "passed": not outcome.missed,
        "missed": list(outcome.missed),
        "not_measured": list(outcome.not_measured),
        "model": manifest.source.model_dump(mode="json"),
        "recipe": outcome.recipe.name,
        "thresholds": outcome.recipe.verify.model_dump(mode="json", exclude={"prompts"}),
        "exported_with": manifest.toolchain,
        "machine": machine_facts(),
        "golden": {g.plan: golden_figures(g) for g in outcome.golden},
    }
    if comparison := outcome.comparison:
        if workload := comparison.workload:
            described["compared"] = {
                "budget": outcome.recipe.verify.budget,
                "predicted_s": workload.seconds,
                **{name: [made, getattr(workload.asked, name)] for name, made in vars(workload.count).items()},
            }
        shares = flops_shares(manifest, outcome.plans)
        described["method"] = VERIFY_METHOD_NOTES
        described["eager"] = eager_figures(outcome.plans, comparison)
        described["plans"] = {
            name: verified_plan_figures(plan, shares, comparison) for name, plan in outcome.plans.items()
        }
        described["variants"] = variant_figures(shares, comparison)
        described["verdicts"] = [
            {
                "plan": v.plan,
                "figure": v.figure,
                "value": v.value,
                "threshold": v.threshold,
                "passed": v.passed,
                "over": v.over,
            }
            for v in outcome.verdicts
        ]
    return described


def machine_facts() -> dict[str, Any]:
    """What measured times depend on, and the versions that drew."""
    names = ("torch", "diffusers", "transformers", "torchao", "prebake")
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{n: version(n) for n in names},
    }


def golden_figures(replayed: Any) -> dict[str, Any]:
    return {
        "passed": not replayed.problems,
        "bitwise": replayed.bitwise,
        "evaluations": list(replayed.evaluations),
        "relative_error_per_evaluation": list(replayed.evaluation_errors),
        "embeddings_relative_error": replayed.embeddings_relative_error,
        "final_latents_relative_error": replayed.final_latents_relative_error,
        "image_psnr_db": replayed.image_psnr_db,
        "tolerance": {
            "relative_error": replayed.tolerance.relative_error,
            "image_psnr_db": replayed.tolerance.image_psnr_db,
            "reason": replayed.tolerance.reason,
        },
    }


def eager_figures(plans: Mapping[str, Plan], comparison: Comparison) -> dict[str, Any]:
    """By number of steps: accuracy, and the time of a picture and of an evaluation of the float32 pipeline."""
    found = {}
    for steps in sorted({p.steps for p in plans.values()}):
        samples = [s for s in all_samples(comparison) if plans[s.plan].steps == steps]
        timed = [*samples, *(t for t in comparison.traces if plans[t.plan].steps == steps)]
        found[str(steps)] = {
            "image_s": median_or_none([s.eager_seconds for s in samples]),
            "bfloat16_psnr_db": list(comparison.loss.pictures_db.get(steps, ())),
            "evaluation_ms": median_or_none([statistics.fmean(s.eager_ms) for s in timed if s.eager_ms]),
            "accuracy_percent": to_percent(comparison.exact_eager.get(steps)),
        }
    return found


def verified_plan_figures(plan: Plan, shares: Mapping[str, float], comparison: Comparison) -> dict[str, Any]:
    """Every figure of one plan."""
    pictures = [s for s in comparison.pictures if s.plan == plan.name]
    checked = [s for s in comparison.checked if s.plan == plan.name]
    samples = pictures + checked
    timed = [*samples, *(t for t in comparison.traces if t.plan == plan.name)]
    return {
        "cache": plan.cache,
        "steps": plan.steps,
        "evaluations": [e.variant for e in plan.evaluations],
        "flops_share_percent": statistics.fmean(shares[e.variant] for e in plan.evaluations),
        "pictures": closeness_figures(pictures),
        "checked_pictures": closeness_figures(checked),
        "relative_error": evaluation_error_figures(
            plan, [s for s in comparison.evaluation_records if s.plan == plan.name]
        ),
        "compiled_error": compiled_error_figures(plan, comparison),
        "cached": cached_figures(pictures),
        "accuracy_percent": to_percent(comparison.exact.get(plan.name)),
        "image_s": median_or_none([s.seconds for s in samples]),
        "evaluation_ms": median_or_none([statistics.fmean(ms for _, ms in s.variant_ms) for s in timed]),
        "speedup": ratio_or_none(
            median_or_none([s.eager_seconds for s in samples]), median_or_none([s.seconds for s in samples])
        ),
    }


def flops_shares(manifest: Manifest, plans: Mapping[str, Plan]) -> dict[str, float]:
    """Variant -> its FLOPs in percent of the largest variant's of its size, which computes everything."""
    shares = {}
    for size in {plan.size for plan in plans.values()}:
        names = {name: None for plan in plans.values() if plan.size == size for name in plan.variants()}
        flops = {name: manifest.graph(name).cost.flops for name in names}
        shares |= {name: 100 * n / max(flops.values()) for name, n in flops.items()}
    return shares


def variant_figures(shares: Mapping[str, float], comparison: Comparison) -> dict[str, Any]:
    """Each variant's measured time beside its FLOP share: where time is the larger one, the skip is not worth its promise."""
    timed = [*all_samples(comparison), *comparison.traces]
    ms = {name: median_or_none([t for s in timed for variant, t in s.variant_ms if variant == name]) for name in shares}
    whole = {name.partition(".")[2]: ms[name] for name, share in shares.items() if share == 100}
    return {
        name: {
            "evaluation_ms": ms[name],
            "flops_share_percent": share,
            "time_share_percent": to_percent(ratio_or_none(ms[name], whole[name.partition(".")[2]])),
        }
        for name, share in shares.items()
    }


def closeness_figures(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """How close pictures are to eager's, or None without pictures."""
    if not samples:
        return None
    return {
        "pictures": len(samples),
        "psnr_db": statistics.fmean(s.psnr_db for s in samples),
        "compiled_error": "the same against the same variant in eager at the same stored values, so without what a cache loses; `of_bfloat16` divides it by what eager bfloat16 loses at that timestep, measured at some and interpolated between them",
        "bfloat16_psnr_db": "the PSNR of pictures of eager bfloat16 against eager float32, same prompts, seeds and steps, from the same noise",
        "uncached_psnr_db": "the PSNR of a cached plan's pictures against the artifact's own without cache",
        "psnr_db_interval_95": list(mean_interval([s.psnr_db for s in samples]) or ())[1:] or None,
        "psnr_db_min": smallest_psnr_db(s.psnr_db for s in samples),
        "ssim": statistics.fmean(s.ssim for s in samples),
        "ssim_min": min(s.ssim for s in samples),
        "latents_relative_error": statistics.fmean(s.latents_relative_error for s in samples),
        "latents_relative_error_max": largest_error(s.latents_relative_error for s in samples),
    }


def evaluation_error_figures(plan: Plan, samples: Sequence[Sample | Trace]) -> dict[str, Any] | None:
    """Teacher-forced errors of the plan's evaluations over the pictures of seed 0, or None without any."""
    table = [s.evaluation_errors for s in samples if s.evaluation_errors]
    if not table:
        return None
    # per evaluation, over pictures; those that were drawn and not compared are empty
    columns = [[x for x in column if x is not None] for column in zip(*table, strict=True)]
    by_variant = {
        v: [x for e, column in zip(plan.evaluations, columns, strict=False) if e.variant == v for x in column]
        for v in plan.variants()
    }
    return {
        "pictures": len(table),
        "evaluations": sum(map(len, columns)),
        "covered_share_95": covered_share(sum(map(len, columns))),
        "max": largest_error(x for column in columns for x in column),
        "mean": statistics.fmean(x for column in columns for x in column),
        "max_per_evaluation": [largest_error(column) if column else None for column in columns],
        "max_per_variant": {name: largest_error(errors) for name, errors in by_variant.items() if errors},
    }


def compiled_error_figures(plan: Plan, comparison: Comparison) -> dict[str, Any] | None:
    """Errors of the evaluations as the artifact makes them, in units of what eager bfloat16 loses, or None without any."""
    errors = relative_errors(plan, comparison)
    if not errors:
        return None
    loss = [comparison.loss.at(plan.size, e.timestep) for e in plan.evaluations]
    return {
        "evaluations": len(errors),
        "of_bfloat16_mean": statistics.fmean(errors),
        "of_bfloat16_max": largest_error(errors),
        "bfloat16_per_evaluation": loss,
        "bfloat16_measured": len(comparison.loss.evaluations.get(plan.size, ())),
    }


def cached_figures(pictures: Sequence[Sample]) -> dict[str, Any] | None:
    """How close a cached plan's pictures are to those without cache, or None where there are none."""
    found = [s.uncached_psnr_db for s in pictures if s.uncached_psnr_db is not None]
    if not found:
        return None
    return {
        "pictures": len(found),
        "uncached_psnr_db": statistics.fmean(found),
        "uncached_psnr_db_min": smallest_psnr_db(found),
    }


def all_samples(comparison: Comparison) -> tuple[Sample, ...]:
    return comparison.pictures + comparison.checked


def median_or_none(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def ratio_or_none(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def to_percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
