"""Export and verify: a model comes in, an artifact and its figures come out. The command line does the same."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from .results import ExportResult, Forecast, VerifyResult
from .runtime.errors import RequestError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .exporter.recipe.resolve import Recipe

    Model = str | os.PathLike[str] | DiffusionPipeline


@overload
def export(
    recipe: str | os.PathLike[str] | Recipe,
    *,
    model: Model | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    dry_run: Literal[False] = False,
    force: bool = False,
    keep_failed: bool = False,
    verify: bool = True,
    cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ExportResult: ...


@overload
def export(
    recipe: str | os.PathLike[str] | Recipe,
    *,
    model: Model | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    dry_run: Literal[True],
    force: bool = False,
    keep_failed: bool = False,
    verify: bool = True,
    cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Forecast: ...


@overload
def export(
    recipe: str | os.PathLike[str] | Recipe,
    *,
    model: Model | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    dry_run: bool,
    force: bool = False,
    keep_failed: bool = False,
    verify: bool = True,
    cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ExportResult | Forecast: ...


def export(
    recipe: str | os.PathLike[str] | Recipe,
    *,
    model: Model | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    force: bool = False,
    keep_failed: bool = False,
    verify: bool = True,
    cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ExportResult | Forecast:
    """Compiles a diffusers pipeline into the artifact folder `output`, compares the two, and gives the path with the figures.

    >>> artifact = prebake.export(
    ...     "baseline", model="tiny:flux", output="artifacts/x", overrides={"sampler.steps": [2], "verify.seeds": 1}
    ... )
    >>> artifact.status, artifact.plans["2"].psnr_db > 60
    ('verified', True)
    >>> forecast = prebake.export("baseline", model="tiny:flux", overrides={"sampler.steps": [2]}, dry_run=True)
    >>> forecast.plans["2"].get("calls")
    {'full': 2}

    `recipe` is the name of one that ships (`prebake recipes`), the path of a .toml file, or a Recipe. `model` stands in for the
    recipe's: a Hub id, a folder, a safetensors file, `shapes`, `tiny:FAMILY`, or a diffusers pipeline that is loaded. Of that
    one a copy is written to a temporary folder (`TMPDIR`; as large as its weights) and exported; the pipeline is left as it was. Its
    weights, configs and scheduler count, LoRAs once they are fused; the manifest has its class as the model's name, and a hash of
    the copy's files. `overrides` are by `table.key`, with TOML's values: numbers, strings, booleans, lists, and None for what a
    recipe may leave out. `output` is `artifacts/<recipe>-<model>` by default.

    `dry_run` stops before anything is compiled and gives a Forecast. `force` replaces an artifact that is there; `verify=False`
    skips the comparison, and `keep_failed` keeps an artifact that missed a threshold, marked as failed. `cache=False` compiles every graph
    anew, `cache_dir` is where compiled graphs are kept. `progress` shows what the command line shows, on stderr.

    Raises RecipeError for a recipe or an override that is not valid, RequestError for an `output` that exists or cannot be
    written and for a pipeline whose LoRAs are not fused, ExportError for a model that cannot be exported so, and QualityError with the
    figures that miss the recipe's thresholds. In each case nothing is written.
    """
    with require_exporter("export"), silence_bars(), model_on_disk(model) as found:
        from .exporter.cli.export import default_output
        from .exporter.cost.forecast import describe_forecast, forecast_graphs
        from .exporter.export_cache.store import Store, default_store_folder
        from .exporter.pipeline import ExportOptions, prepare
        from .exporter.pipeline import export as export_recipe
        from .exporter.progress import open_progress
        from .exporter.recipe.resolve import check_inductor_flags, check_scheduler, recipe_folder

        asked = resolve_recipe(recipe, overrides, found)
        near = (
            recipe_folder(recipe if isinstance(recipe, str) else Path(recipe))
            if isinstance(recipe, str | os.PathLike)
            else None
        )
        check_inductor_flags(asked.compile.inductor)
        check_scheduler(asked.sampler.scheduler)
        with open_progress("rich" if progress else "quiet") as shown:
            if dry_run:
                prepared = prepare(asked, shown, near=near)
                with shown.stage("forecast"):
                    return Forecast(**describe_forecast(prepared, forecast_graphs(prepared, shown)))
            store = Store(Path(cache_dir) if cache_dir else default_store_folder()) if cache else None
            options = ExportOptions(force=force, keep_failed=keep_failed, verify=verify, near=near, store=store)
            folder = export_recipe(asked, Path(output) if output else default_output(asked), options, shown)
        return describe_export(folder, shown.seconds, shown.graphs)


def verify(
    artifact: str | os.PathLike[str],
    *,
    source: bool = False,
    model: Model | None = None,
    prompts: str | os.PathLike[str] | None = None,
    prompt_set: Literal["recipe", "accuracy", "all"] = "all",
    seeds: int | None = None,
    limit: int | None = None,
    budget: str | None = None,
    results: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> VerifyResult:
    """What the artifact draws on this machine, against the golden vectors of its export and, with `source`, its pipeline.

    >>> result = prebake.verify("artifacts/x")
    >>> result.passed, result.missed
    (True, ())

    With `source` the eager float32 pipeline draws the same prompts and seeds, and the recipe's thresholds decide; what the
    artifact has unverified is then marked as verified, and the report goes to `output`, or to the artifact's `reports/`. `model`
    says where the pipeline is, if not where the manifest says, as for `export`. `prompts` is a file with one a line in place of the
    recipe's, `prompt_set` which sets are drawn, `seeds` and `limit` how many of each, `budget`
    the time for it ("90s", "10m", "2h" or "full") in place of the recipe's. What the pipeline gives is kept in the folder `results`, and what
    is there is not drawn again.

    Raises ArtifactError for a folder that cannot be opened here, and RecipeError for choices that do not fit it. A threshold
    that is missed is no error: see `missed`.
    """
    with require_exporter("verify"), silence_bars(), model_on_disk(model) as found:
        from .exporter.progress import open_progress
        from .exporter.verify import report
        from .exporter.verify.options import VerifyOptions
        from .exporter.verify.outcome_tables import print_outcome
        from .exporter.verify.verify import verify_artifact
        from .runtime.figures import describe_plan, plan_report

        folder = Path(artifact)
        kept = Path(results) if results else None
        options = VerifyOptions(
            source, found, Path(prompts) if prompts else None, prompt_set, seeds, limit, budget, results=kept
        )
        with open_progress("rich" if progress else "quiet") as shown:
            manifest, outcome = verify_artifact(folder, options, shown)
        described = report.describe_outcome(manifest, outcome)
        text = io.StringIO()
        print_outcome(manifest, outcome, text)
        if output or source:
            report.write_verify_report(Path(output) if output else folder / "reports", manifest, outcome)
    measured = described.get("plans", {})
    plans = {n: describe_plan(manifest, p, plan_report(measured, p)) for n, p in outcome.plans.items()}
    return VerifyResult(folder, manifest.status, tuple(outcome.missed), plans, described, text.getvalue().rstrip("\n"))


def describe_export(folder: Path, seconds: Mapping[str, float], graphs: Mapping[str, str]) -> ExportResult:
    """The artifact that is in `folder`, with the figures of its report."""
    from .runtime.artifact import read_plans
    from .runtime.figures import plan_figures
    from .runtime.manifest import read_manifest
    from .runtime.text import folder_bytes

    manifest = read_manifest(folder)
    plans = plan_figures(folder, manifest, read_plans(folder, manifest))
    return ExportResult(folder, manifest.status, plans, folder_bytes(manifest)["total"], dict(seconds), dict(graphs))


def resolve_recipe(
    recipe: str | os.PathLike[str] | Recipe, overrides: Mapping[str, Any] | None, model: str | None
) -> Recipe:
    """The recipe with the overrides and the model. Raises RecipeError with one line per problem."""
    from .exporter.recipe.resolve import change_recipe, resolve

    if isinstance(recipe, str | os.PathLike):
        return resolve(recipe if isinstance(recipe, str) else Path(recipe), overrides or {}, model)
    return change_recipe(recipe, f"recipe {recipe.name}", overrides or {}, model)


@contextlib.contextmanager
def model_on_disk(model: Model | None) -> Iterator[str | None]:
    """The name or path of the model; of a loaded pipeline the folder of a copy, which is removed at the end."""
    if model is None or isinstance(model, str | os.PathLike):
        yield None if model is None else os.fspath(model)
        return
    from .exporter.load.pipeline_copy import copy_pipeline

    with tempfile.TemporaryDirectory(prefix="prebake-model-") as folder:
        yield str(copy_pipeline(model, Path(folder) / type(model).__name__))


@contextlib.contextmanager
def require_exporter(command: str) -> Iterator[None]:
    """Raises RequestError, with what to install, for a package of the extra that is not there."""
    try:
        yield
    except ModuleNotFoundError as e:
        from .exporter.cli.errors import missing_extra

        if said := missing_extra(e, command):
            raise RequestError(said.replace(f"`prebake {command}`", f"prebake.{command}")) from e
        raise


@contextlib.contextmanager
def silence_bars() -> Iterator[None]:
    """diffusers and transformers draw no bars of their own meanwhile; those that the caller had switched on come back."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [
        library for library in (diffusers_logging, transformers_logging) if getattr(library, "_tqdm_active", False)
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
