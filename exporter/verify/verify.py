"""Verify: an artifact and the eager pipeline draw the same prompts, and the recipe's thresholds decide.

`pipeline.py` calls `write_golden` and `settle_verdict` on the staged folder; `prebake verify` calls
`verify_artifact` on a finished one. `comparison.py` measures, `verdicts.py` judges, `report.py` writes down. An
artifact that goes on has the status "verified", or "failed" if that was asked for. What an export could not settle, since
the code runs on another machine, `verify_artifact` settles there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...runtime.artifact import open_artifact
from ...runtime.check.artifact import check_artifact
from ...runtime.errors import ArtifactError, QualityError, RecipeError
from ...runtime.manifest import Manifest, read_manifest
from ...runtime.storage.private_folder import default_cache_folder
from ..load.prompts import picture_prompts
from ..package.folder import file_entries, stage_linked_copy, update_manifest
from ..progress import Progress
from ..recipe.duration import parse_duration
from ..recipe.resolve import Recipe
from . import denoiser_alone as attached
from . import report
from .budget import Costs, PictureJob, Workload, choose_workload
from .checked_prompts import CheckedPrompts, checked_prompts
from .comparison import add_size_traces, measure_pictures
from .costs import measure_costs
from .gaps import comparison_gaps
from .golden import GoldenReplay, plans_without_golden, replay_golden, write_plan_golden
from .loss import measure_loss
from .opening import load_reference, open_replayer
from .options import VerifyOptions, override_prompts, refuse_lone_part, refuse_source_options
from .outcome import Outcome
from .plan_check import judge_plans
from .prompt_choice import limit_prompts, picture_jobs, threshold_prompts
from .range_probes import plans_with_probes
from .reference import EagerReference
from .replayer import ArtifactReplayer, Replayer
from .results import EagerResults, RememberedReference, model_digest, workload_digest
from .source_pipeline import manifest_recipe, source_model
from .verdicts import describe_verification, judge_comparison
from .weight_check import judge_weights


def settle_verdict(folder: Path, manifest: Manifest, recipe: Recipe, keep_failed: bool, progress: Progress) -> None:
    """Compares the staged folder with eager, writes `reports/`, and writes "verified" or "failed" into its manifest.

    Raises QualityError with every threshold that is missed, unless `keep_failed`.
    """
    replayer = open_replayer(open_artifact(folder), recipe, recipe.model.id)
    outcome = compare_with_source(
        replayer, recipe, recipe.model.id, picture_jobs(recipe), threshold_prompts(recipe, manifest), progress
    )
    if outcome.missed and not keep_failed:
        way_out = "the artifact is not written; --keep-failed writes it all the same, marked as failed"
        raise QualityError("\n".join([*outcome.missed, way_out]))
    status = "failed" if outcome.missed else "verified"
    manifest = manifest.model_copy(update={"status": status, "verification": describe_verification(outcome)})
    (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")
    report.write_verify_report(folder / "reports", manifest, outcome)


def verify_artifact(folder: Path, choices: VerifyOptions, progress: Progress) -> tuple[Manifest, Outcome]:
    """The manifest, and what was found: the golden vectors replayed here and, `with_source`, the chosen comparison. If that
    is of everything and passes, what the artifact has unverified is marked as verified.

    Raises ArtifactError for a folder that cannot be opened, that was written without a recipe that this version reads, or
    that has nothing to replay, and RecipeError for choices that do not fit it.
    """
    manifest = read_manifest(folder)
    check_artifact(folder, manifest)
    recipe = manifest_recipe(folder, manifest)
    if not choices.with_source:
        refuse_source_options(choices)
        refuse_nothing_to_replay(folder, manifest)
        replayer = open_replayer(open_artifact(folder, trust="size"), recipe, "")
        with progress.stage("verify", len(replayer.artifact.plans)):
            golden = replay_golden_vectors(replayer, progress)
        return manifest, Outcome(recipe, replayer.artifact.plans, golden, not_measured=(not_compared(manifest),))
    refuse_lone_part(choices)
    recipe = override_prompts(recipe, choices)
    jobs, checked = chosen_prompts(manifest, recipe, choices)
    model = choices.model or source_model(manifest)
    results = EagerResults(choices.results or default_cache_folder() / "verify" / model_digest(manifest, recipe))
    lacking = plans_without_golden(folder, manifest.plans)
    if choices.is_complete and (lacking or manifest.unverified or manifest.status == "unverified"):
        found = complete_verification(folder.resolve(), manifest, recipe, model, jobs, checked, progress, results)
    else:
        replayer = open_replayer(open_artifact(folder, trust="size"), recipe, model)
        with progress.stage("verify", len(replayer.artifact.plans) + 3):
            outcome = compare_with_source(replayer, recipe, model, jobs, checked, progress, results)
        found = manifest, drop_verdicts(outcome, *choices.part) if choices.part else outcome
    if not choices.results:
        results.remove()
    return found


def chosen_prompts(
    manifest: Manifest, recipe: Recipe, choices: VerifyOptions
) -> tuple[tuple[PictureJob, ...], CheckedPrompts | None]:
    """What is drawn. Raises RecipeError where that is nothing."""
    jobs = () if choices.prompt_set == "accuracy" else picture_jobs(recipe, choices.limit)
    checked = (
        None if choices.prompt_set == "recipe" else limit_prompts(checked_prompts(manifest.source.model), choices.limit)
    )
    if not jobs and checked is None:
        raise RecipeError(
            f"--prompt-set accuracy: model {manifest.source.model!r} has no checker; leave the option out"
        )
    jobs = choices.take_part(jobs)
    checked = checked and replace(checked, prompts=choices.take_part(checked.prompts))
    if not jobs and not (checked and checked.prompts):
        raise RecipeError("--part: there are fewer pictures than parts; take fewer parts")
    return jobs, checked


def drop_verdicts(outcome: Outcome, part: int, parts: int) -> Outcome:
    """The outcome of a part, which is held to nothing: a mean of it is not the mean of all."""
    note = (
        f"part {part} of {parts} was drawn, and nothing was held to the recipe: put the folders of all parts together, and "
        "`prebake verify --source --budget full --results FOLDER` judges them"
    )
    return replace(outcome, verdicts=(), not_measured=(note,))


class MissedThreshold(Exception):
    """A threshold was missed, and the artifact stays as it was."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


def complete_verification(
    folder: Path,
    manifest: Manifest,
    recipe: Recipe,
    model: str,
    jobs: Sequence[PictureJob],
    checked: CheckedPrompts | None,
    progress: Progress,
    results: EagerResults,
) -> tuple[Manifest, Outcome]:
    """The golden vectors that the artifact lacks, and the verdict, in one move; if the verdict is not clean, neither.

    A status "failed" stays, and so do plans that were not compared.
    """
    try:
        with stage_linked_copy(folder) as fresh:
            replayer = open_replayer(open_artifact(fresh, trust="size"), recipe, model)
            with progress.stage("verify", len(manifest.plans) + 4):
                progress.announce("golden vectors")
                write_missing_golden(replayer, recipe)
                outcome = compare_with_source(replayer, recipe, model, jobs, checked, progress, results)
            if outcome.missed:
                raise MissedThreshold(outcome)
            status = "failed" if manifest.status == "failed" else "verified"
            left = tuple(name for name in manifest.unverified if name not in outcome.plans)
            changed = manifest.model_copy(
                update={"status": status, "unverified": left, "verification": describe_verification(outcome)}
            )
            manifest = update_manifest(fresh, changed, manifest)
    except MissedThreshold as e:
        return manifest, e.outcome
    progress.note(f"{folder.name} has golden vectors of all plans, and is marked {manifest.status}")
    return manifest, outcome


def not_compared(manifest: Manifest) -> str:
    """What a replay alone leaves open, and whether it was settled before."""
    if manifest.status != "verified":
        return "the artifact was not compared with the eager pipeline: that is `prebake verify --source`"
    others = f", its plan {', '.join(manifest.unverified)} excepted" if manifest.unverified else ""
    return f"the artifact was compared with the eager pipeline before, and passed{others}; `prebake verify --source` compares again"


def refuse_nothing_to_replay(folder: Path, manifest: Manifest) -> None:
    """Raises ArtifactError for plans without golden vectors."""
    if lacking := plans_without_golden(folder, manifest.plans):
        raise ArtifactError(
            f"{folder}: there are no golden vectors to replay (plan {', '.join(lacking)}); "
            f"`prebake verify {folder} --source` compares the artifact with its pipeline, and writes them"
        )


def compare_with_source(
    replayer: ArtifactReplayer,
    recipe: Recipe,
    model: str,
    jobs: Sequence[PictureJob],
    checked: CheckedPrompts | None,
    progress: Progress,
    results: EagerResults | None = None,
) -> Outcome:
    """Golden vectors, then the comparison, then the verdicts. What eager gives is kept in `results`, and not asked for again. Plans of another scheduler than the recipe's (`prebake plan
    --scheduler` adds such) draw other pictures, and are replayed only."""
    artifact, manifest = replayer.artifact, replayer.artifact.manifest
    reference = load_reference(artifact.folder, manifest, recipe, model)
    if results:
        reference = RememberedReference(reference, results, model_digest(manifest, recipe))
    golden = replay_golden_vectors(replayer, progress)
    lacking = plans_without_golden(artifact.folder, plans_with_probes(artifact))
    not_replayed = tuple(f"plan {name} has no golden vectors to replay" for name in lacking)
    every = plans_with_probes(artifact)
    plans = {name: p for name, p in every.items() if p.scheduler == reference.scheduler}
    others = tuple(
        f"plan {name} was not compared: it is for {p.scheduler}, the recipe's scheduler is {reference.scheduler}"
        for name, p in every.items()
        if name not in plans
    )
    usual = {name: plan for name, plan in plans.items() if plan.size is None}
    chosen = replayer.only(usual)

    def choose() -> Workload:
        return choose_work(chosen, reference, recipe, jobs, checked)

    asked = workload_digest(manifest, recipe, jobs, len(checked.prompts) if checked else 0)
    workload = results.workload(asked, choose) if results else choose()
    progress.note(f"compared with eager within verify.budget = {recipe.verify.budget}: {workload.describe()}")
    comparison = measure_pictures(chosen, reference, workload, checked, progress)
    further = [plan for name, plan in plans.items() if name not in usual]
    comparison = add_size_traces(comparison, replayer, reference, picture_prompts(recipe)[0], further, progress)
    weights, unknown = judge_weights(artifact, reference.weights())
    loss = measure_loss(reference, comparison.known_evaluations, comparison.known_pictures, progress)
    comparison = replace(comparison, loss=loss, known_evaluations=(), known_pictures=())
    numbers, not_rebuilt = judge_plans(artifact.folder, manifest, recipe, plans, reference.pipe.scheduler)
    verdicts = (*judge_comparison(manifest, recipe, plans, comparison), *numbers, *weights)
    return Outcome(
        recipe,
        plans,
        golden,
        comparison,
        verdicts,
        (*comparison_gaps(manifest, recipe, plans, comparison), *not_rebuilt, *unknown, *others, *not_replayed),
    )


def choose_work(
    replayer: ArtifactReplayer,
    reference: EagerReference,
    recipe: Recipe,
    jobs: Sequence[PictureJob],
    checked: CheckedPrompts | None,
) -> Workload:
    """What the recipe's budget allows of the pictures and the checked prompts."""
    plans, prompts = replayer.artifact.plans, checked.prompts if checked else ()
    budget = parse_duration(recipe.verify.budget)
    start = time.perf_counter()
    job = (*jobs, *((prompt, 0) for prompt in prompts))[0]
    costs = measure_costs(replayer, reference, job) if plans else Costs({}, 0.0)
    left = None if budget is None else max(0.0, budget - (time.perf_counter() - start))
    return choose_workload(left, costs, plans, replayer.artifact.manifest.whole_graphs, jobs, len(prompts))


def write_golden(folder: Path, manifest: Manifest, recipe: Recipe) -> Manifest:
    """The manifest with `golden/<plan>.safetensors` among its files: one prompt, seed 0, drawn with every plan; of a denoiser
    alone its calls for that picture.

    The files depend on the artifact and nothing else. Raises ExportError where the denoiser gives NaN or infinity.
    """
    write_missing_golden(open_replayer(open_artifact(folder), recipe, recipe.model.id), recipe)
    manifest = manifest.model_copy(update={"files": file_entries(folder)})
    (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")
    return manifest


def replay_golden_vectors(replayer: ArtifactReplayer, progress: Progress) -> tuple[GoldenReplay, ...]:
    """The golden vectors that there are, against their replay."""
    artifact, replayed = replayer.artifact, []
    plans = plans_with_probes(artifact)
    lacking = plans_without_golden(artifact.folder, plans)
    for plan in (plan for name, plan in plans.items() if name not in lacking):
        progress.announce(f"golden vectors of plan {plan.name}")
        whole = isinstance(replayer, Replayer)
        replayed.append(replay_golden(replayer, plan) if whole else attached.replay_attached_golden(artifact, plan))
    return tuple(replayed)


def write_missing_golden(replayer: Replayer | attached.AttachedReplayer, recipe: Recipe) -> None:
    """Golden vectors of the plans that have none, in the folder of the replayer's artifact."""
    for name in plans_without_golden(replayer.artifact.folder, plans_with_probes(replayer.artifact)):
        if isinstance(replayer, attached.AttachedReplayer):
            attached.write_attached_plan_golden(replayer, recipe, name)
        else:
            write_plan_golden(replayer, recipe, name)
