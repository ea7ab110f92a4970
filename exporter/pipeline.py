"""An export from end to end; read this file first. A recipe goes in, a verified artifact comes out.

    load ─ rewrite ─ plan ─ capture ─ lower ─ package ─ verify

Each stage is a module of that name (plan and rewrite are packages), takes values and returns values. What is decided
here once is never asked again at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.check.machine import machine_problems
from ..runtime.manifest import Manifest
from . import add_plan as replan
from .caches import TeaCache
from .caches.common import calibration as calibrations
from .caches.common.fallback import cache_or_fallback
from .calibrators import teacache
from .capture.variants import capture_components, capture_variants
from .cost.count import count_cost
from .cost.variants import check_variant_costs
from .denoiser_alone import prepare as alone
from .export_cache.compilation import CompileOrReuse
from .export_cache.store import Store
from .families.registry import FAMILIES, find_family
from .load import source
from .lower import load_backend
from .package import folder as package
from .package.manifest import describe_artifact
from .passes.attention_backend import set_attention_backend
from .passes.captured_graph import run_passes
from .plan import make_plans
from .plan.sampler import SchedulerTable
from .prepared_export import PreparedExport
from .progress import Progress
from .recipe.resolve import Recipe
from .rewrite import rewrite_pipeline
from .settle import (
    component_dtypes,
    has_channels_last_vae,
    has_picture_input,
    sampler_table,
    sampler_tails,
    set_scheduler,
    settle,
)
from .sites.discover import discover_layout
from .sites.guidance import add_planes
from .sites.layout import Layout
from .verify import denoiser_alone as attached
from .verify.verify import settle_verdict, write_golden


@dataclass(frozen=True)
class ExportOptions:
    """Choices of one run that do not belong to a recipe. `keep_failed` writes an artifact that misses its thresholds,
    marked as failed; `verify=False` writes it unverified; `near` is where the recipe's file lies, and the files it names.
    `store` keeps what graphs were compiled into; None compiles each."""

    force: bool = False
    keep_failed: bool = False
    verify: bool = True
    near: Path | None = None
    store: Store | None = None


def export(recipe: Recipe, output: Path, options: ExportOptions, progress: Progress) -> Path:
    """Writes the artifact folder `output` and returns it. Raises RecipeError or ExportError; then nothing is written."""
    with package.stage_folder(output, force=options.force) as folder:
        prepared = prepare(recipe, progress, near=options.near)
        prepared, paths = lower(folder, prepared, progress, options.store)
        manifest = write_folder(folder, prepared, paths, progress)
        verify(folder, prepared, manifest, options, progress)
    return output


def prepare(recipe: Recipe, progress: Progress, *, near: Path | None = None) -> PreparedExport:
    """load, rewrite, plan and capture: the graphs and their costs, before any of them is compiled."""
    recipe, changes = load_backend(recipe.compile.backend).adapt_recipe(recipe)
    for change in changes:
        progress.note(change)
    with progress.stage("load"):
        progress.announce(recipe.model.id)
        loaded = source.load_model(
            recipe.model.id, recipe.model.revision, component_dtypes(recipe), recipe.model.config
        )
        pipe = set_scheduler(loaded.pipe, recipe.sampler.scheduler)
    if alone.is_denoiser_alone(recipe, type(pipe).__name__ in FAMILIES):
        return alone.prepare_denoiser(recipe, loaded, progress, near)
    with progress.stage("settle"):
        family = find_family(pipe)
        defaults, size, steps = settle(recipe, family, loaded)
        tables = {n: sampler_table(family, pipe, size, n, progress) for n in steps}
        tails = {n: sampler_tails(recipe, family, pipe, size, n) for n in steps}
        cache = cache_or_fallback(recipe.cache, loaded.source, size, tables, near, progress)
        recipe = recipe.model_copy(update={"cache": cache})
        calibration = calibrations.load_calibration(recipe.cache, loaded.source, near, size)
    with progress.stage("rewrite"):
        layers = rewrite_pipeline(pipe, recipe, progress)
    with progress.stage("plan"):
        denoiser = family.denoiser(pipe, size, recipe.guidance)
        denoiser = add_planes(denoiser) if recipe.cache.needs_planes else denoiser
        layout = discover_layout(denoiser)
        scale = family.facts(pipe, size)["timestep_scale"]
        decisions = teacache_decisions(recipe, denoiser, layout, tables, scale) or calibration
        planned = make_plans(recipe.cache, layout, tables, decisions, tails=tails)
    components = family.others(
        pipe, size, channels_last=has_channels_last_vae(recipe), picture=has_picture_input(recipe, family)
    )
    with progress.stage("capture", len(planned.variants) + len(components)):
        planned, variants = capture_variants(denoiser, planned, progress, recipe.attention.dtype)
        others = capture_components(components, progress)
        graphs = {"denoiser": variants, **{g.name: (g,) for g in others}}
        costs = {g.name: count_cost(g) for group in graphs.values() for g in group}
        check_variant_costs(denoiser, planned, costs)
    return PreparedExport(
        recipe, family, pipe, size, loaded.source, defaults, layers, calibration, layout, planned, graphs, costs
    )


def teacache_decisions(
    recipe: Recipe, denoiser: Any, layout: Layout, tables: dict[int, SchedulerTable], scale: float
) -> Any:
    """TeaCache's decisions where its signal is the timestep's embedding, which needs weights and no calibration; else None."""
    if not isinstance(recipe.cache, TeaCache) or not recipe.cache.exact:
        return None
    return teacache.decide_by_timesteps(recipe.cache, denoiser, layout, tables, timestep_scale=scale)


def lower(
    folder: Path, prepared: PreparedExport, progress: Progress, store: Store | None = None
) -> tuple[PreparedExport, dict[str, str]]:
    """The graphs as the backend has rewritten them, and graph -> path of its code in the folder."""
    config = prepared.recipe.compile
    lowering = load_backend(config.backend)
    asked = prepared.recipe.attention.backend
    chosen = {
        component: tuple(set_attention_backend(g, asked) for g in group) if component.startswith("denoiser") else group
        for component, group in prepared.graphs.items()
    }
    passes = lowering.list_passes(config)
    graphs = {component: tuple(run_passes(g, passes) for g in group) for component, group in chosen.items()}
    with progress.stage("lower", sum(map(len, graphs.values()))):
        making = CompileOrReuse.of(prepared.recipe, prepared.source.model, store, progress)
        paths = lowering.lower(folder, graphs, config, making)
    if store:
        progress.note(making.summary())
    return replace(prepared, graphs=graphs), paths


def write_folder(folder: Path, prepared: PreparedExport, paths: Mapping[str, str], progress: Progress) -> Manifest:
    """Weights, plans and tokenizers in the folder, and the manifest that describes them and the code."""
    with progress.stage("package", 1):
        progress.announce("weights")
        weights = package.write_weights(folder, prepared.graphs)
        if bind := getattr(load_backend(prepared.recipe.compile.backend), "bind", None):
            bind(folder, paths, weights.bound)
        package.write_plans(folder, prepared.planned.plans)
        if prepared.recording is None:
            (folder / replan.PLAN_INPUTS_FILE).write_text(
                replan.plan_inputs_json(prepared.pipe, prepared.layout, prepared.planned), "utf-8"
            )
            package.write_tokenizers(folder, prepared.family.tokenizers(prepared.pipe, prepared.size))
        if prepared.calibration:
            calibrations.write_calibration(folder / calibrations.CALIBRATION_FILE, prepared.calibration)
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
    with progress.stage("verify", len(manifest.plans) + 1):
        if lacking := list(machine_problems(manifest)):
            progress.note(f"not verified, and marked so, since it cannot run on this machine: it {lacking[0]}")
            return
        progress.announce("golden vectors")
        if prepared.recording is None:
            manifest = write_golden(folder, manifest, prepared.recipe)
        else:
            manifest = attached.write_attached_golden(folder, manifest, prepared.recipe, prepared.recipe.model.id)
        if options.verify:
            settle_verdict(folder, manifest, prepared.recipe, options.keep_failed, progress)
