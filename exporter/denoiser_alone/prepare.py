"""Alone: the denoiser of any diffusers pipeline, exported without a family file, for `prebake.runtime.attach`.

In: a loaded pipeline and the recipe. Out: what `pipeline.py` lowers and packages, as for a family; but the graphs are the
denoiser's only, one set for each kind of call that `record.py` saw, and the plans say what each call is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.attachment.facts import graph_name
from ...runtime.errors import RecipeError
from ...runtime.manifest import Defaults
from ..caches.common import calibration as calibrations
from ..caches.common.fallback import cache_or_fallback
from ..cost.count import count_cost
from ..load.source import LoadedPipeline
from ..passes.captured_graph import CapturedGraph
from ..plan import make_plans
from ..progress import Progress
from ..prompts import picture_prompts
from ..recipe.resolve import Recipe
from ..rewrite import rewrite_denoiser
from ..sites.discover import discover_layout
from .observation import PipelineRequest, pipeline_request
from .recording import record_pipeline

if TYPE_CHECKING:
    from ..prepared_export import PreparedExport


def is_denoiser_alone(recipe: Recipe, has_family: bool) -> bool:
    """True if the denoiser alone is exported: the recipe says so, or says nothing and the pipeline has no family."""
    return recipe.model.part == "denoiser" or (recipe.model.part is None and not has_family)


def prepare_denoiser(recipe: Recipe, loaded: LoadedPipeline, progress: Progress, near: Path | None) -> PreparedExport:
    """record, rewrite, plan and capture. `loaded` has the recipe's scheduler already."""
    from ..capture.variants import capture_variants
    from ..cost.variants import check_variant_costs
    from ..prepared_export import PreparedExport

    pipe = loaded.pipe
    refuse_tables(recipe)
    with progress.stage("record"):
        request = recipe_request(recipe, loaded, picture_prompts(recipe)[0])
        steps = recipe.sampler.steps or (default_argument(loaded, "num_inference_steps"),)
        progress.announce(f"{type(pipe).__name__}, {', '.join(map(str, steps))} steps")
        recording = record_pipeline(pipe, request, steps)
        defaults = call_defaults(recipe, loaded, steps[0])
        tables = recording.tables()
        cache = cache_or_fallback(recipe.cache, loaded.source, defaults, tables, near, progress)
        recipe = recipe.model_copy(update={"cache": cache})
        calibration = calibrations.load_calibration(recipe.cache, loaded.source, near, defaults)
    with progress.stage("rewrite"):
        layers = rewrite_denoiser(recording.name, recording.denoiser, recipe, progress)
    with progress.stage("plan"):
        first, *others = recording.components()
        layout = discover_layout(first)
        planned = make_plans(recipe.cache, layout, tables, calibration)
        planned = replace(planned, plans=tuple(recording.with_calls(p) for p in planned.plans))
    with progress.stage("capture", len(planned.variants) * (1 + len(others))):
        kept, variants = capture_variants(first, planned, progress, recipe.attention.dtype)
        graphs = {first.name: variants}
        for i, component in enumerate(others, 1):
            _, more = capture_variants(component, planned, progress, recipe.attention.dtype)
            graphs[component.name] = tuple(rename_graph(g, i) for g in more)
        costs = {g.name: count_cost(g) for group in graphs.values() for g in group}
        check_variant_costs(first, kept, costs)
    return PreparedExport(
        recipe,
        None,
        pipe,
        defaults,
        loaded.source,
        defaults,
        layers,
        calibration,
        layout,
        kept,
        graphs,
        costs,
        recording,
    )


def rename_graph(graph: CapturedGraph, call: int) -> CapturedGraph:
    """The variant's graph for a later kind of call."""
    return replace(graph, name=graph_name(graph.name, call))


def refuse_tables(recipe: Recipe) -> None:
    """Raises RecipeError for what needs more than the denoiser, or a family that knows its inputs."""
    if recipe.sampler.image_to_image:
        raise RecipeError("sampler.image_to_image: an artifact of the denoiser alone has no VAE; leave the key out")
    if recipe.cache.exact:
        raise RecipeError(
            f"cache.method {recipe.cache.method!r} with this signal reads the timestep's embedding, which is known of families "
            "only; set cache.signal=modulated and name a calibration, or take another cache"
        )


# --- what the pipeline is called with -------------------------------------------------------------------------------


def recipe_request(recipe: Recipe, loaded: LoadedPipeline, prompt: str, **changes: Any) -> PipelineRequest:
    """The calls that the recipe describes: its sizes and guidance, else the model's own, else the pipeline's."""
    of_recipe = {**recipe.shapes.model_dump(), "guidance_scale": recipe.sampler.guidance_scale}
    chosen = {**loaded.defaults, **{name: v for name, v in of_recipe.items() if v is not None}}
    return pipeline_request(loaded.pipe, prompt, chosen, {**recipe.attach.arguments, **changes})


def call_defaults(recipe: Recipe, loaded: LoadedPipeline, steps: int) -> Defaults:
    """What is known of a call: `height` and `width` are 0 where only the pipeline knows them."""
    request = recipe_request(recipe, loaded, "")(steps, 0)

    def known(name: str) -> Any:
        return request.get(name) or default_argument(loaded, name) or 0

    return Defaults(
        num_inference_steps=steps,
        guidance_scale=float(known("guidance_scale")),
        height=int(known("height")),
        width=int(known("width")),
        num_frames=int(known("num_frames")) or None,
    )


def default_argument(loaded: LoadedPipeline, name: str) -> Any:
    """The model's own value of an argument, else the default of the pipeline's call, else None."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(type(loaded.pipe).__call__).parameters
    default = parameters[name].default if name in parameters else None
    return loaded.defaults.get(name, None if default is inspect.Parameter.empty else default)
