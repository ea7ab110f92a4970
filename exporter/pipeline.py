"""An export from end to end; read this file first. A recipe goes in, a verified artifact comes out.

    load ─ rewrite ─ plan ─ capture ─ lower ─ package ─ verify

Each stage is a module of that name (plan and rewrite are packages), takes values and returns values. What is decided
here once is never asked again at run time.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.attachment import FAMILY, variant_name
from ..runtime.errors import ExportError, RecipeError
from ..runtime.machine import machine_problems
from ..runtime.manifest import Cost, Defaults, Graph, Manifest, Requires, Site, Source
from . import alone, attached, package, replan, source
from . import calibration as calibrations
from .caches import TeaCache
from .calibration import Calibration
from .calibrators import teacache
from .capture import Captured, capture
from .cost import check_skips, cost, module_flops
from .discover import discover
from .fallback import that_holds
from .families.picture import VAE_ENCODER
from .guidance import with_planes
from .layout import Layout
from .lower import backend
from .lower.cuda_attention import attention_by
from .making import Making
from .marks import Mark, Variant
from .package import Weights
from .plan import Planned, plan, without_dead
from .plan.sampler import Table, tabulate, tail_tables
from .progress import Progress
from .recipe import Recipe
from .record import Recording
from .rewrite import DENOISERS, Layers, rewrite
from .rewrite.attention import attention_in
from .sites import VariantModule
from .store import Store
from .toolchain import versions
from .verify import settle_verdict, write_golden

FAMILIES = {
    "CogVideoXPipeline": "cogvideox",
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "flux_kontext",
    "StableDiffusionPipeline": "sd",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLPipeline": "sdxl",
}


@dataclass(frozen=True)
class Options:
    """Choices of one run that do not belong to a recipe. `keep_failed` writes an artifact that misses its thresholds,
    marked as failed; `verify=False` writes it unverified; `near` is where the recipe's file lies, and the files it names.
    `store` keeps what graphs were compiled into; None compiles each."""

    force: bool = False
    keep_failed: bool = False
    verify: bool = True
    near: Path | None = None
    store: Store | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before anything is compiled: what `--dry-run` prints. `recording` is there where the denoiser
    is exported alone (`alone.py`), and then `family` is not."""

    recipe: Recipe
    family: Any
    pipe: Any
    size: Any
    source: Source
    defaults: Defaults
    layers: Layers
    calibration: Calibration | None
    layout: Layout
    planned: Planned
    graphs: dict[str, tuple[Captured, ...]]
    costs: dict[str, Cost]
    recording: Recording | None = None


def export(recipe: Recipe, output: Path, options: Options, progress: Progress) -> Path:
    """Writes the artifact folder `output` and returns it. Raises RecipeError or ExportError; then nothing is written."""
    with package.staged(output, force=options.force) as folder:
        prepared = prepare(recipe, progress, near=options.near)
        prepared, paths = lower(folder, prepared, progress, options.store)
        manifest = write(folder, prepared, paths, progress)
        verify(folder, prepared, manifest, options, progress)
    return output


def prepare(recipe: Recipe, progress: Progress, *, near: Path | None = None) -> Prepared:
    """load, rewrite, plan and capture: the graphs and their costs, before any of them is compiled."""
    recipe, changes = backend(recipe.compile.backend).adapted(recipe)
    for change in changes:
        progress.note(change)
    with progress.stage("load"):
        progress.doing(recipe.model.id)
        loaded = source.load(recipe.model.id, recipe.model.revision, dtypes(recipe), recipe.model.config)
        pipe = with_scheduler(loaded.pipe, recipe.sampler.scheduler)
    if alone.is_alone(recipe, type(pipe).__name__ in FAMILIES):
        return alone.prepare(recipe, loaded, progress, near)
    with progress.stage("settle"):
        family = family_of(pipe)
        defaults, size, steps = settle(recipe, family, loaded)
        tables = {n: sampler_table(family, pipe, size, n, progress) for n in steps}
        tails = {n: tails_of(recipe, family, pipe, size, n) for n in steps}
        cache = that_holds(recipe.cache, loaded.source, size, tables, near, progress)
        recipe = recipe.model_copy(update={"cache": cache})
        calibration = calibrations.load(recipe.cache, loaded.source, near, size)
    with progress.stage("rewrite"):
        layers = rewrite(pipe, recipe)
    with progress.stage("plan"):
        denoiser = family.denoiser(pipe, size, recipe.guidance)
        denoiser = with_planes(denoiser) if getattr(recipe.cache, "needs_planes", False) else denoiser
        layout = discover(denoiser)
        scale = family.facts(pipe, size)["timestep_scale"]
        decisions = exact(recipe, denoiser, layout, tables, scale) or calibration
        planned = plan(recipe.cache, layout, tables, decisions, tails=tails)
    components = family.others(pipe, size, channels_last=channels_last(recipe), picture=takes_pictures(recipe, family))
    with progress.stage("capture", len(planned.variants) + len(components)):
        planned, variants = capture_variants(denoiser, planned, progress, recipe.attention.dtype)
        others = capture_others(components, progress)
        graphs = {"denoiser": variants, **{g.name: (g,) for g in others}}
        costs = {g.name: cost(g) for group in graphs.values() for g in group}
        check_variants(denoiser, planned, costs)
    return Prepared(
        recipe, family, pipe, size, loaded.source, defaults, layers, calibration, layout, planned, graphs, costs
    )


def exact(recipe: Recipe, denoiser: Any, layout: Layout, tables: dict[int, Table], scale: float) -> Any:
    """TeaCache's decisions where its signal is the timestep's embedding, which needs weights and no calibration; else None."""
    if not isinstance(recipe.cache, TeaCache) or not recipe.cache.exact:
        return None
    return teacache.exact(recipe.cache, denoiser, layout, tables, timestep_scale=scale)


def lower(
    folder: Path, prepared: Prepared, progress: Progress, store: Store | None = None
) -> tuple[Prepared, dict[str, str]]:
    """The graphs as the backend has rewritten them, and graph -> path of its code in the folder."""
    config = prepared.recipe.compile
    lowering = backend(config.backend)
    asked = prepared.recipe.attention.backend
    chosen = {
        component: tuple(attention_by(g, asked) for g in group) if component.startswith("denoiser") else group
        for component, group in prepared.graphs.items()
    }
    graphs = {component: tuple(lowering.rewritten(g, config) for g in group) for component, group in chosen.items()}
    with progress.stage("lower", sum(map(len, graphs.values()))):
        making = Making.of(prepared.recipe, prepared.source.model, store, progress)
        paths = lowering.lower(folder, graphs, config, making)
    if store:
        progress.note(making.summary())
    return replace(prepared, graphs=graphs), paths


def write(folder: Path, prepared: Prepared, paths: Mapping[str, str], progress: Progress) -> Manifest:
    """Weights, plans and tokenizers in the folder, and the manifest that describes them and the code."""
    with progress.stage("package", 1):
        progress.doing("weights")
        weights = package.write_weights(folder, prepared.graphs)
        if bind := getattr(backend(prepared.recipe.compile.backend), "bind", None):
            bind(folder, paths, weights.bound)
        package.write_plans(folder, prepared.planned.plans)
        if prepared.recording is None:
            (folder / replan.FILE).write_text(replan.kept(prepared.pipe, prepared.layout, prepared.planned), "utf-8")
            package.write_tokenizers(folder, prepared.family.tokenizers(prepared.pipe, prepared.size))
        if prepared.calibration:
            calibrations.write(folder / calibrations.FILE, prepared.calibration)
        manifest = describe(folder, prepared, weights, paths)
        (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")
    return manifest


def verify(folder: Path, prepared: Prepared, manifest: Manifest, options: Options, progress: Progress) -> None:
    """Replays the folder as a user would, adds golden vectors, and holds it against the eager pipeline.

    Code for another machine than this one stays unverified, with a note. Raises QualityError with the figures that miss
    the recipe's thresholds, unless `keep_failed`.
    """
    with progress.stage("verify", len(manifest.plans) + 1):
        if lacking := list(machine_problems(manifest)):
            progress.note(f"not verified, and marked so, since it cannot run on this machine: it {lacking[0]}")
            return
        progress.doing("golden vectors")
        if prepared.recording is None:
            manifest = write_golden(folder, manifest, prepared.recipe)
        else:
            manifest = attached.write_golden(folder, manifest, prepared.recipe, prepared.recipe.model.id)
        if options.verify:
            settle_verdict(folder, manifest, prepared.recipe, options.keep_failed, progress)


def dtypes(recipe: Recipe) -> dict[str, torch.dtype]:
    """Component -> dtype, as `from_pretrained(torch_dtype=...)` takes it; those that a pipeline lacks are passed over."""
    of = recipe.precision
    names = {
        **dict.fromkeys(DENOISERS, of.denoiser),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), of.text_encoders),
        "vae": of.vae,
    }
    return {"default": torch.float32, **{component: getattr(torch, name) for component, name in names.items()}}


def family_of(pipe: Any) -> Any:
    """The family module of a pipeline. Raises ExportError with those that exist."""
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ExportError(
            f'pipeline {name} has no family here: its denoiser alone can be exported, which model.part = "denoiser" says; '
            f"pipelines with one: {', '.join(sorted(FAMILIES))}"
        )
    return importlib.import_module(f".families.{FAMILIES[name]}", __package__)


def settle(recipe: Recipe, family: Any, loaded: source.Loaded) -> tuple[Defaults, Any, tuple[int, ...]]:
    """Sizes, steps and guidance: the recipe's word, else the model's own default, else the family's."""
    usual = {**family.defaults(loaded.pipe), **loaded.defaults}
    asked = {**recipe.shapes.model_dump(), "guidance_scale": recipe.sampler.guidance_scale}
    chosen = {name: usual[name] if asked.get(name) is None else asked[name] for name in usual}
    steps = recipe.sampler.steps or (usual["num_inference_steps"],)
    frames = chosen.get("num_frames")
    size = family.Size(chosen["height"], chosen["width"], chosen["max_sequence_length"], frames or 1)
    family.check_size(loaded.pipe, size)
    if check_steps := getattr(family, "check_steps", None):
        for n in steps:
            check_steps(loaded.pipe, n)
    defaults = Defaults(
        num_inference_steps=steps[0],
        guidance_scale=float(chosen["guidance_scale"]),
        height=size.height,
        width=size.width,
        num_frames=frames,
    )
    return defaults, size, steps


def with_scheduler(pipe: Any, name: str) -> Any:
    """The pipeline with the named diffusers scheduler made from its own one's configuration."""
    if name != "model":
        import diffusers

        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    return pipe


def sampler_table(family: Any, pipe: Any, size: Any, steps: int, progress: Progress) -> Table:
    progress.doing(f"{type(pipe.scheduler).__name__}, {steps} steps")
    return tabulate(pipe.scheduler, steps, **schedule_arguments(family, pipe, size, steps))


def schedule_arguments(family: Any, pipe: Any, size: Any, steps: int) -> dict[str, Any]:
    """What the pipeline passes to its scheduler besides the number of steps."""
    return family.scheduler_arguments(pipe.scheduler, family.facts(pipe, size)["latents_shape"], steps)


def tails_of(recipe: Recipe, family: Any, pipe: Any, size: Any, steps: int) -> dict[int, Table]:
    """The schedules that begin in the middle, by the number of steps that they leave out; none without pictures to begin
    from."""
    if not recipe.sampler.image_to_image:
        return {}
    return tail_tables(pipe.scheduler, steps, **schedule_arguments(family, pipe, size, steps))


def channels_last(recipe: Recipe) -> bool:
    """Whether the VAE's weights lie as N H W C."""
    return recipe.compile.channels_last_vae and backend(recipe.compile.backend).CHANNELS_LAST


def takes_pictures(recipe: Recipe, family: Any) -> bool:
    """Whether the artifact needs the VAE's encoder. Raises RecipeError where a family has no use for it."""
    picture = getattr(family, "PICTURE", None)
    if recipe.sampler.image_to_image and (picture is None or picture.get("role") == "reference"):
        raise RecipeError("sampler.image_to_image: this family's pipelines start from noise alone; leave the key out")
    return picture is not None and (recipe.sampler.image_to_image or picture.get("required", False))


def capture_variants(
    denoiser: Any, planned: Planned, progress: Progress, attention: str | None = None
) -> tuple[Planned, tuple[Captured, ...]]:
    """Every variant as a graph, its attention in the dtype of that name, None = as it is. Variants that read stored values go first: what none of them reads is not stored."""

    def captured(variant: Variant, marks: tuple[Mark, ...]) -> Captured:
        module = VariantModule(denoiser.module, marks, variant, denoiser.inputs)
        graph = capture(variant.name, module, module.examples(denoiser.args), module.inputs, module.outputs)
        return attention_in(graph, getattr(torch, attention)) if attention else graph

    readers = [v for v in planned.variants if v.having("combine")]
    for variant in readers:
        progress.doing(f"denoiser: {variant.name}, reads")
    read = [captured(v, planned.marks) for v in readers]
    stored = {s.name for g in read for s in g.inputs if "@" in s.name}
    used = {s.name for g in read for s in g.live_inputs()}
    dead = {name.partition("@")[0] for name in stored} - {name.partition("@")[0] for name in used}
    planned = replace(planned, marks=without_dead(planned.marks, frozenset(dead)))
    graphs = []
    for variant in planned.variants:
        progress.doing(f"denoiser: {variant.name}")
        again = dead or variant not in readers
        graphs.append(captured(variant, planned.marks) if again else read[readers.index(variant)])
    return planned, tuple(graphs)


def capture_others(components: tuple[Any, ...], progress: Progress) -> tuple[Captured, ...]:
    graphs = []
    for component in components:
        progress.doing(component.name)
        graphs.append(capture(component.name, component.module, component.args, component.inputs, component.outputs))
    return tuple(graphs)


def check_variants(denoiser: Any, planned: Planned, costs: dict[str, Cost]) -> None:
    """Holds each variant's counted FLOPs against those of the modules that it should skip."""
    if len(planned.variants) == 1:
        return
    inside = module_flops(denoiser.module, denoiser.args)
    for variant in planned.variants[1:]:
        skipped = {site for site, action in variant.actions if action not in ("compute", "pass")}
        # attention without its scores still computes its values
        marks = [m for m in planned.marks if m.name in skipped and m.part == "output"]
        paths = {path for mark in marks for path in mark.modules}
        check_skips(costs["full"], costs[variant.name], variant.name, sum(inside.get(p, 0) for p in paths))


def describe(folder: Path, prepared: Prepared, weights: Weights, paths: Mapping[str, str]) -> Manifest:
    """The manifest, still unverified."""
    lowering = backend(prepared.recipe.compile.backend)
    planned = prepared.planned
    combined = {site for v in planned.variants for site in v.having("combine")}
    marks = tuple(m for m in planned.marks if m.name in combined)
    variants = {v.name: v for v in planned.variants}
    graphs = []
    for group in prepared.graphs.values():
        for g in group:
            variant = variants.get(variant_name(g.name), Variant(g.name, ()))
            graphs.append(
                Graph(
                    name=g.name,
                    package=paths[g.name],
                    inputs=g.inputs,
                    outputs=g.outputs,
                    stores=tuple(m.name for m in variant.storing(marks)) if variant.name in variants else (),
                    combines=variant.combining(marks),
                    zeros=variant.having("zero"),
                    identities=variant.having("identity"),
                    constants=weights.bound[g.name],
                    cost=prepared.costs[g.name],
                )
            )
    return Manifest(
        family=FAMILY if prepared.recording else FAMILIES[type(prepared.pipe).__name__],
        backend=prepared.recipe.compile.backend,
        reproducible=lowering.reproducible(prepared.recipe.compile),
        requires=Requires(**machine(prepared.recipe), **lowering.requires(prepared.recipe)),
        source=prepared.source,
        toolchain={**versions(), **lowering.toolchain(prepared.recipe.compile)},
        recipe=own_recipe(prepared).model_dump(mode="json"),
        defaults=prepared.defaults,
        pipeline=facts(prepared),
        layers=prepared.layers,
        channels_last=weights.channels_last,
        complex=weights.complex,
        sites=tuple(Site(name=m.name, slots=m.slots, tensors=m.tensors) for m in marks),
        graphs=tuple(graphs),
        plans={p.name: package.plan_path(p) for p in planned.plans},
        files=package.file_entries(folder),
    )


def facts(prepared: Prepared) -> dict[str, Any]:
    """The family's facts, and what pictures it takes; of a denoiser alone what `attach` holds a pipeline to."""
    if prepared.recording:
        return prepared.recording.facts.model_dump(mode="json")
    family, size = prepared.family, prepared.size
    own = family.facts(prepared.pipe, size)
    if "picture" in own or VAE_ENCODER not in prepared.graphs:
        return own
    return {**own, "picture": {"height": size.height, "width": size.width, **family.PICTURE}}


def own_recipe(prepared: Prepared) -> Recipe:
    """The recipe as the artifact has it: the model by its name, the calibration as the artifact's own file."""
    recipe = prepared.recipe
    names = {"id": prepared.source.model, "config": recipe.model.config and source.name_of(recipe.model.config)}
    changes: dict[str, Any] = {"model": recipe.model.model_copy(update=names)}
    if prepared.calibration:
        changes["cache"] = recipe.cache.model_copy(update={"calibration": calibrations.FILE})
    return recipe.model_copy(update=changes)


def machine(recipe: Recipe) -> dict[str, Any]:
    """System, processor family and device, as `Requires` names them."""
    import platform

    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "device": recipe.compile.device,
    }
