"""The denoiser alone as what is exported: that of any diffusers pipeline, without a family, for `prebake.runtime.attach`.

In: a loaded pipeline and the recipe. Out: what `pipeline.py` lowers and packages, as for a whole pipeline; but the graphs
are the denoiser's only, one set for each kind of call that `recording.py` saw, and the plans say what each call is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ...runtime.errors import RecipeError
from ...runtime.manifest import ATTACH_FAMILY, Defaults, LegalSizes, SizeEntry
from ..caches.common.calibration import Calibration
from ..families.registry import family_name
from ..load.prompts import picture_prompts
from ..load.source import LoadedPipeline
from ..lower import Backend
from ..lower.int8_weights import refuse_components
from ..passes.captured_graph import CapturedGraph
from ..plan import PlanSet, make_plans
from ..plan.sampler import SchedulerTable
from ..progress import Progress
from ..recipe.resolve import Recipe
from ..rewrite import LayerTreatments, rewrite_denoiser
from ..sites.component import Component
from ..sites.layout import Layout
from .observation import PipelineRequest, pipeline_request
from .recording import PipelineRecording, record_pipeline


def is_denoiser_alone(recipe: Recipe, pipe: Any) -> bool:
    """True if the denoiser alone is exported: the recipe says so, or says nothing and the pipeline has no family."""
    return recipe.model.part == "denoiser" or (recipe.model.part is None and family_name(pipe) is None)


@dataclass(frozen=True, kw_only=True)
class DenoiserAlone:
    """A `ModelPart`: the denoiser of a recorded pipeline, whose own loop, prompts and pictures stay as they are."""

    stage: ClassVar[str] = "record"
    HOISTS: ClassVar[bool] = False
    pipe: Any
    defaults: Defaults
    recording: PipelineRecording
    tables: Mapping[int, SchedulerTable]

    @classmethod
    def of(cls, recipe: Recipe, loaded: LoadedPipeline, progress: Progress) -> DenoiserAlone:
        """The loaded pipeline recorded at the recipe's steps. Raises RecipeError for what needs more than the denoiser."""
        refuse_tables(recipe)
        request = recipe_request(recipe, loaded, picture_prompts(recipe)[0])
        steps = recipe.sampler.steps or (default_argument(loaded, "num_inference_steps"),)
        progress.announce(f"{type(loaded.pipe).__name__}, {', '.join(map(str, steps))} steps")
        recording = record_pipeline(loaded.pipe, request, steps)
        defaults = call_defaults(recipe, loaded, steps[0])
        return cls(pipe=loaded.pipe, defaults=defaults, recording=recording, tables=recording.tables())

    @property
    def size(self) -> Defaults:
        """As far as the call says it."""
        return self.defaults

    @property
    def family_name(self) -> str:
        """The manifest's `family`."""
        return ATTACH_FAMILY

    def rewrite(self, recipe: Recipe, backend: Backend, progress: Progress) -> LayerTreatments:
        """Changes the denoiser's modules. Raises RecipeError where the recipe would change others."""
        refuse_components(recipe, "the denoiser is exported alone")
        return rewrite_denoiser(self.recording.name, self.recording.denoiser, recipe, backend, progress)

    def denoisers(self, recipe: Recipe, backend: Backend) -> tuple[Component, ...]:
        """One for each kind of call that was recorded."""
        return self.recording.components()

    def other_components(self, recipe: Recipe, backend: Backend) -> tuple[Component, ...]:
        """None: the pipeline has them."""
        return ()

    def plan(self, recipe: Recipe, denoiser: Component, layout: Layout, calibration: Calibration | None) -> PlanSet:
        """The plans, with the calls that the pipeline makes at each evaluation."""
        planned = make_plans(recipe.cache, layout, self.tables, calibration)
        return replace(planned, plans=tuple(self.recording.with_calls(p) for p in planned.plans))

    def facts(self, graphs: Mapping[str, Sequence[CapturedGraph]]) -> dict[str, Any]:
        """What `attach` holds a pipeline to."""
        return self.recording.facts.model_dump(mode="json")

    def size_entries(self, graphs: Mapping[str, Sequence[CapturedGraph]]) -> tuple[SizeEntry, ...]:
        """None: the recorded calls have one size."""
        return ()

    def legal_sizes(self) -> LegalSizes | None:
        """None, as of sizes."""
        return None

    def write_files(self, folder: Path, layout: Layout, planned: PlanSet) -> None:
        """Nothing: plans follow the pipeline's own schedule, and it has its own tokenizers."""


def refuse_tables(recipe: Recipe) -> None:
    """Raises RecipeError for what needs more than the denoiser, or a family that knows its inputs."""
    if recipe.sampler.image_to_image:
        raise RecipeError("sampler.image_to_image: an artifact of the denoiser alone has no VAE; leave the key out")
    asked = {
        "sizes": recipe.shapes.sizes,
        "height or width as a range": recipe.shapes.is_ranged,
        "batch": recipe.shapes.batch != (1,),
    }
    if key := next((key for key, value in asked.items() if value), None):
        raise RecipeError(
            f"shapes.{key}: a denoiser alone is exported for the calls that its pipeline was seen to make; leave it out"
        )
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
