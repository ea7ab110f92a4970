"""An export from end to end; read this file first. A recipe goes in, a verified artifact comes out.

    load ─ settle ─ rewrite ─ plan ─ capture ─ hoist ─ lower ─ package ─ verify

Each stage takes values and returns values. What is exported is a `ModelPart`: a whole pipeline, or a denoiser alone, settled by `record`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..runtime.check.machine import machine_problems
from ..runtime.manifest import Manifest
from .caches.common.calibration import CALIBRATION_FILE, write_calibration
from .caches.common.fallback import settle_cache
from .capture.variants import capture_part
from .cost.variants import count_and_check
from .denoiser_alone.part import DenoiserAlone, is_denoiser_alone
from .export_cache.compilation import CompileOrReuse
from .export_cache.store import Store
from .hoist.hoist import hoist_export
from .lower import load_backend
from .lower.graphs import rewrite_graphs
from .package import folder as package
from .package.manifest import describe_artifact
from .prepared_export import ExportOptions, PreparedExport
from .progress import Progress
from .recipe.resolve import Recipe
from .settle import component_dtypes, load_pipeline
from .sites.discover import discover_layout
from .verify.verify import settle_verdict, write_golden
from .whole_pipeline import WholePipeline


def export(recipe: Recipe, output: Path, options: ExportOptions, progress: Progress) -> Path:
    """Writes the artifact folder `output` and returns it. Raises RecipeError or ExportError; then nothing is written."""
    with package.stage_folder(output, force=options.force) as folder:
        prepared = prepare(recipe, progress, near=options.near)
        prepared, paths = lower(folder, prepared, progress, options.store)
        manifest = write_folder(folder, prepared, paths, progress)
        verify(folder, prepared, manifest, options, progress)
    return output


def prepare(recipe: Recipe, progress: Progress, *, near: Path | None = None) -> PreparedExport:
    """load, settle, rewrite, plan, capture and hoist: the graphs and their costs, before any of them is compiled."""
    backend = load_backend(recipe.compile.backend)
    recipe, changes = backend.adapt_recipe(recipe)
    for change in changes:
        progress.note(change)
    with progress.stage("load"):
        progress.announce(recipe.model.id)
        loaded = load_pipeline(recipe, component_dtypes(recipe))
    kind = DenoiserAlone if is_denoiser_alone(recipe, loaded.pipe) else WholePipeline
    with progress.stage(kind.stage):
        part = kind.of(recipe, loaded, progress)
        cache, calibration = settle_cache(recipe.cache, loaded.source, part.size, part.tables, near, progress)
        recipe = recipe.model_copy(update={"cache": cache})
    with progress.stage("rewrite"):
        layers = part.rewrite(recipe, backend, progress)
    with progress.stage("plan"):
        denoisers = part.denoisers(recipe, backend)
        layout = discover_layout(denoisers[0])
        planned = part.plan(recipe, denoisers[0], layout, calibration)
    others = part.other_components(recipe, backend)
    with progress.stage("capture", len(planned.variants) * len(denoisers) + len(others)):
        planned, graphs = capture_part(denoisers, others, planned, progress, recipe.attention.dtype)
        censuses, costs = count_and_check(denoisers[0], planned, graphs)
    prepared = PreparedExport(
        recipe=recipe,
        backend=backend,
        part=part,
        source=loaded.source,
        layers=layers,
        calibration=calibration,
        layout=layout,
        planned=planned,
        graphs=graphs,
        costs=costs,
        censuses=censuses,
    )
    return hoist_export(prepared, denoisers)


def lower(
    folder: Path, prepared: PreparedExport, progress: Progress, store: Store | None = None
) -> tuple[PreparedExport, dict[str, str]]:
    """The graphs as the backend has rewritten them, and graph -> path of its code in the folder."""
    prepared = rewrite_graphs(prepared)
    with progress.stage("lower", sum(map(len, prepared.graphs.values()))):
        compilation = CompileOrReuse.of(prepared, store, progress)
        paths = prepared.backend.lower(folder, prepared.graphs, prepared.recipe.compile, compilation)
    if store:
        progress.note(compilation.summary())
    return prepared, paths


def write_folder(folder: Path, prepared: PreparedExport, paths: Mapping[str, str], progress: Progress) -> Manifest:
    """Weights, plans and tokenizers in the folder, and the manifest that describes them and the code."""
    with progress.stage("package", 1):
        progress.announce("weights")
        weights = package.write_weights(folder, prepared.graphs)
        if bind := getattr(prepared.backend, "bind", None):
            bind(folder, paths, weights.bound)
        package.write_plans(folder, prepared.planned.plans)
        prepared.part.write_files(folder, prepared.layout, prepared.planned)
        if prepared.calibration:
            write_calibration(folder / CALIBRATION_FILE, prepared.calibration)
        manifest = describe_artifact(folder, prepared, weights, paths)
        (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")
    return manifest


def verify(
    folder: Path, prepared: PreparedExport, manifest: Manifest, options: ExportOptions, progress: Progress
) -> None:
    """Replays the folder as a user would, adds golden vectors, and holds it against the eager pipeline.

    Code for another machine than this one stays unverified, with a note. Raises QualityError with the figures that miss
    the recipe's thresholds, unless `keep_failed`.
    """
    with progress.stage("verify", len(manifest.plans) + 2):
        if lacking := list(machine_problems(manifest)):
            progress.note(f"not verified, and marked so, since it cannot run on this machine: it {lacking[0]}")
            return
        progress.announce("golden vectors")
        manifest = write_golden(folder, manifest, prepared.recipe)
        if options.verify:
            settle_verdict(folder, manifest, prepared.recipe, options.keep_failed, progress)
