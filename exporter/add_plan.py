"""Replan: another plan for an artifact that exists, in seconds, because its variants are compiled and a plan is data.

In: an artifact and a number of steps, a scheduler or a cache. Out: the same artifact with that plan, its golden vectors and
a manifest that lists both; the folder changes in one move. What a plan is made of besides the recipe is in
`replan.json` (`plan/inputs.py`); `replan/rebuild.py` makes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from ..runtime.artifact import open_artifact
from ..runtime.check.artifact import check_artifact, plan_problems
from ..runtime.errors import ExportError, QualityError, RecipeError, RequestError
from ..runtime.manifest import Manifest, read_manifest
from ..runtime.plan import Plan, size_plan_name
from .caches.common import calibration as calibrations
from .package.folder import plan_path, stage_linked_copy, update_manifest, write_plans
from .progress import Progress
from .recipe.resolve import Recipe
from .replan.rebuild import build_plans
from .verify import report
from .verify.golden import golden_path, write_plan_golden
from .verify.prompt_choice import picture_jobs, threshold_prompts
from .verify.range_probes import plans_with_probes
from .verify.replayer import Replayer
from .verify.source_pipeline import source_model
from .verify.verify import compare_with_source


@dataclass(frozen=True)
class PlanOptions:
    """One `prebake plan`. `verify` compares the plan with the pipeline, found at `model` if not where the manifest says."""

    force: bool = False
    verify: bool = False
    dry_run: bool = False
    model: str | None = None


def add_plans(
    folder: Path, recipe: Recipe, steps: int, choices: PlanOptions, progress: Progress
) -> tuple[Manifest, dict[str, Plan]]:
    """The manifest with the new plans, and these. `recipe` is the artifact's own with what the caller changed.

    Raises RequestError where the plan exists, unless forced, and ExportError where the variants do not, or a threshold is missed; then the artifact is as it was.
    """
    manifest = read_manifest(folder)
    check_artifact(folder, manifest, trust="size")
    with progress.stage("plan"):
        if str(steps) in manifest.plans and not choices.force:
            raise RequestError(f"{folder}: plan '{steps}' is there already; replace it with --force")
        made, calibration = build_plans(folder, manifest, recipe, steps, progress)
        plans = {p.name: p for p in made}
        replaced = plan_names(manifest, str(steps)) & set(manifest.plans)
        listed = manifest_with_plans(manifest_without_plans(manifest, replaced - set(plans)), plans)
        if problems := list(plan_problems(plans, listed)):
            raise ExportError("\n".join(problems))
    if choices.dry_run:
        return manifest, plans
    with stage_linked_copy(folder) as fresh:
        unlink_plans(fresh, manifest, replaced)
        shutil.rmtree(report_folder(fresh, str(steps)), ignore_errors=True)
        write_plans(fresh, tuple(plans.values()))
        if calibration and not (fresh / calibrations.CALIBRATION_FILE).exists():
            calibrations.write_calibration(fresh / calibrations.CALIBRATION_FILE, calibration)
        manifest = update_manifest(fresh, listed, manifest)
        replayer = Replayer(open_artifact(fresh, trust="size"))
        added = [n for n in plans_with_probes(replayer.artifact) if n in plans or n.partition("@")[0] in plans]
        with progress.stage("golden", len(added)):
            for name in added:
                progress.announce(f"golden vectors of plan {name}")
                write_plan_golden(replayer, recipe, name)
        manifest = update_manifest(fresh, manifest, manifest)
        if choices.verify:
            manifest = verify_plans(fresh, manifest, recipe, plans, choices, progress)
    return manifest, plans


def verify_plans(
    folder: Path, manifest: Manifest, recipe: Recipe, plans: dict[str, Plan], choices: PlanOptions, progress: Progress
) -> Manifest:
    """Compares these plans alone with the pipeline; the report goes to `reports/plan-<steps>/`."""
    artifact = open_artifact(folder, trust="size")
    with progress.stage("verify", len(plans) + 2):
        chosen = Replayer(artifact).only(plans)
        model = choices.model or source_model(manifest)
        outcome = compare_with_source(
            chosen, recipe, model, picture_jobs(recipe), threshold_prompts(recipe, manifest), progress
        )
    if outcome.missed:
        raise QualityError("\n".join([*outcome.missed, "the plan is not added"]))
    report.write_verify_report(report_folder(folder, next(iter(plans))), manifest, outcome)
    left = tuple(name for name in manifest.unverified if name not in plans)
    return update_manifest(folder, manifest.model_copy(update={"unverified": left}), manifest)


def remove_plan(folder: Path, name: str) -> Manifest:
    """The manifest without that plan; without a plan `20`, the plan `20-uncached` could not be reached, and goes too.

    Raises RecipeError for a plan that is not there, or that calls use by default.
    """
    manifest = read_manifest(folder)
    check_artifact(folder, manifest, trust="size")
    if name not in manifest.plans:
        raise RecipeError(f"{folder}: has no plan {name!r}; it has {', '.join(manifest.plans)}")
    default = str(manifest.defaults.num_inference_steps)
    gone = plan_names(manifest, name) & set(manifest.plans)
    if name in plan_names(manifest, default):
        raise RecipeError(f"{folder}: plan {name!r} belongs to the default of {default} steps, and stays")
    with stage_linked_copy(folder) as fresh:
        unlink_plans(fresh, manifest, gone)
        shutil.rmtree(report_folder(fresh, name), ignore_errors=True)
        return update_manifest(fresh, manifest_without_plans(manifest, gone), manifest)


def plan_names(manifest: Manifest, name: str) -> set[str]:
    """That plan and the one without its cache, at every size."""
    sizes = (None, *(size.name for size in manifest.sizes))
    return {size_plan_name(plan, size) for plan in (name, f"{name}-uncached") for size in sizes}


def manifest_without_plans(manifest: Manifest, names: Set[str]) -> Manifest:
    """Lists these plans no more."""
    left = {n: path for n, path in manifest.plans.items() if n not in names}
    unverified = tuple(n for n in manifest.unverified if n not in names)
    return manifest.model_copy(update={"plans": left, "unverified": unverified})


def unlink_plans(folder: Path, manifest: Manifest, names: Set[str]) -> None:
    """Takes the files of these plans out of a folder of links."""
    for name in names:
        (folder / manifest.plans[name]).unlink()
        for golden in (folder / golden_path(name), *folder.glob(golden_path(f"{name}@*"))):
            golden.unlink(missing_ok=True)


def report_folder(folder: Path, name: str) -> Path:
    """Where `add` reports on the plans of that number of steps, `20` and `20-uncached` alike."""
    return folder / "reports" / f"plan-{name.partition('@')[0].removesuffix('-uncached')}"


def manifest_with_plans(manifest: Manifest, plans: Mapping[str, Plan]) -> Manifest:
    """Lists them, as plans that nobody has compared with the pipeline."""
    added = {name: plan_path(plan) for name, plan in plans.items()}
    return manifest.model_copy(
        update={
            "plans": {**manifest.plans, **added},
            "unverified": tuple(sorted({*manifest.unverified, *added})),
        }
    )
