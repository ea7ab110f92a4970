"""Verify: an artifact and the eager pipeline draw the same prompts, and the recipe's thresholds decide.

`pipeline.py` calls `write_golden` and `settle_verdict` on the staged folder; `prebake verify` calls
`verify_artifact` on a finished one. `comparison.py` measures, `verdicts.py` judges, `report.py` writes down. An
artifact that goes on has the status "verified", or "failed" if that was asked for. What an export could not settle, since
the code runs on another machine, `verify_artifact` settles there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...runtime.artifact import Artifact, open_artifact
from ...runtime.check.artifact import check_artifact
from ...runtime.errors import ArtifactError, QualityError, RecipeError
from ...runtime.manifest import ATTACH_FAMILY, Manifest, read_manifest
from ..families.registry import load_family
from ..load.prompts import picture_prompts
from ..package.folder import file_entries, stage_linked_copy, update_manifest
from ..progress import Progress
from ..recipe.duration import parse_duration
from ..recipe.resolve import Recipe
from . import denoiser_alone as attached
from . import report
from .budget import Costs, PictureJob, Workload, choose_workload
from .checked_prompts import CheckedPrompts, checked_prompts
from .comparison import add_size_traces, measure_costs, measure_pictures
from .golden import GoldenReplay, plans_without_golden, replay_golden, write_plan_golden
from .outcome import Outcome
from .prompt_choice import limit_prompts, picture_jobs, read_prompts, threshold_prompts
from .range_probes import plans_with_probes
from .reference import EagerReference, Reference
from .replayer import ArtifactReplayer, Replayer
from .source_pipeline import load_source_pipeline, manifest_recipe, source_model
from .verdicts import comparison_gaps, describe_verification, judge_comparison


@dataclass(frozen=True)
class VerifyOptions:
    """What one `prebake verify` draws. Without `with_source`, only the golden vectors are replayed.

    `model` says where the pipeline is, if not where the manifest says. `prompts` and `seeds` stand in for the recipe's;
    `prompt_set` is "recipe", "accuracy" (the prompts that the model's checker judges), or "all". `limit` is the largest
    number of prompts of each. `budget` stands in for the recipe's `verify.budget`; what is chosen by one of the others is drawn
    however long it takes.
    """

    with_source: bool = False
    model: str | None = None
    prompts: Path | None = None
    prompt_set: str = "all"
    seeds: int | None = None
    limit: int | None = None
    budget: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the recipe's prompts and seeds, and all checked prompts, are drawn."""
        return self.with_source and self.prompt_set == "all" and (self.prompts, self.seeds, self.limit) == (None,) * 3


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
    recipe = override_prompts(recipe, choices)
    jobs = () if choices.prompt_set == "accuracy" else picture_jobs(recipe, choices.limit)
    checked = (
        None if choices.prompt_set == "recipe" else limit_prompts(checked_prompts(manifest.source.model), choices.limit)
    )
    if not jobs and checked is None:
        raise RecipeError(
            f"--prompt-set accuracy: model {manifest.source.model!r} has no checker; leave the option out"
        )
    model = choices.model or source_model(manifest)
    lacking = plans_without_golden(folder, manifest.plans)
    if choices.is_complete and (lacking or manifest.unverified or manifest.status == "unverified"):
        return complete_verification(folder.resolve(), manifest, recipe, model, jobs, checked, progress)
    replayer = open_replayer(open_artifact(folder, trust="size"), recipe, model)
    with progress.stage("verify", len(replayer.artifact.plans) + 2):
        return manifest, compare_with_source(replayer, recipe, model, jobs, checked, progress)


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
) -> tuple[Manifest, Outcome]:
    """The golden vectors that the artifact lacks, and the verdict, in one move; if the verdict is not clean, neither.

    A status "failed" stays, and so do plans that were not compared.
    """
    try:
        with stage_linked_copy(folder) as fresh:
            replayer = open_replayer(open_artifact(fresh, trust="size"), recipe, model)
            with progress.stage("verify", len(manifest.plans) + 3):
                progress.announce("golden vectors")
                write_missing_golden(replayer, recipe)
                outcome = compare_with_source(replayer, recipe, model, jobs, checked, progress)
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


def refuse_source_options(choices: VerifyOptions) -> None:
    """Raises RecipeError for choices that would have no effect."""
    chosen = {
        "--model": choices.model,
        "--prompts": choices.prompts,
        "--seeds": choices.seeds,
        "--limit": choices.limit,
        "--budget": choices.budget,
    }
    given = [name for name, value in chosen.items() if value is not None] + ["--prompt-set"] * (
        choices.prompt_set != "all"
    )
    if given:
        raise RecipeError(
            f"{', '.join(given)}: says how the artifact is compared with its pipeline; add --source, or leave it out"
        )


def compare_with_source(
    replayer: ArtifactReplayer,
    recipe: Recipe,
    model: str,
    jobs: Sequence[PictureJob],
    checked: CheckedPrompts | None,
    progress: Progress,
) -> Outcome:
    """Golden vectors, then the comparison, then the verdicts. Plans of another scheduler than the recipe's (`prebake plan
    --scheduler` adds such) draw other pictures, and are replayed only."""
    artifact, manifest = replayer.artifact, replayer.artifact.manifest
    reference = load_reference(manifest, recipe, model)
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
    workload = choose_work(chosen, reference, recipe, jobs, checked)
    progress.note(f"compared with eager within verify.budget = {recipe.verify.budget}: {workload.describe()}")
    comparison = measure_pictures(chosen, reference, workload, checked, progress)
    further = [plan for name, plan in plans.items() if name not in usual]
    comparison = add_size_traces(comparison, replayer, reference, picture_prompts(recipe)[0], further, progress)
    verdicts = judge_comparison(manifest, recipe, plans, comparison)
    return Outcome(
        recipe,
        plans,
        golden,
        comparison,
        verdicts,
        (*comparison_gaps(recipe, plans, comparison), *others, *not_replayed),
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


def open_replayer(artifact: Artifact, recipe: Recipe, model: str) -> Replayer | attached.AttachedReplayer:
    """What draws with the artifact: the artifact itself, or of a denoiser alone its pipeline, loaded from `model` if it draws."""
    if artifact.manifest.family == ATTACH_FAMILY:
        return attached.AttachedReplayer(artifact, recipe, model)
    return Replayer(artifact)


def load_reference(manifest: Manifest, recipe: Recipe, model: str) -> EagerReference:
    """The manifest's pipeline, loaded again in float32 and left as it is, with the recipe's scheduler.

    Raises RecipeError when `model` is not the one that the artifact was made of.
    """
    loaded = load_source_pipeline(manifest, recipe, model, torch.float32)
    if manifest.family == ATTACH_FAMILY:
        return attached.AttachedReference(recipe, loaded)
    return Reference(loaded.pipe, load_family(manifest.family), manifest, recipe.guidance)


def override_prompts(recipe: Recipe, choices: VerifyOptions) -> Recipe:
    """The recipe with the prompts, seeds and budget of the command line. Raises RecipeError for a file without prompts, and for a
    budget that is no time."""
    changes: dict[str, Any] = {} if choices.seeds is None else {"seeds": choices.seeds}
    if choices.budget is not None:
        try:
            parse_duration(choices.budget)
        except ValueError as e:
            raise RecipeError(f"--budget {e}") from e
        changes["budget"] = choices.budget
    elif not choices.is_complete:
        changes["budget"] = "full"
    if choices.prompts is not None:
        changes["prompts"] = read_prompts(choices.prompts)
    return recipe.model_copy(update={"verify": recipe.verify.model_copy(update=changes)})
