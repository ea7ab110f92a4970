"""The whole pipeline as what is exported: the denoiser, what prompts and pictures need, and what its family knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..runtime.manifest import Defaults, LegalSizes, SizeEntry, batch_graph_name, size_graph_name
from ..runtime.sizes.dimension import Dimension, fit_dimension
from ..runtime.sizes.size_range import SizeRange
from .caches import TeaCache
from .caches.common.calibration import CalibratedCache, Calibration
from .calibrators import teacache
from .families.picture import VAE_ENCODER, Size, encodes_distribution
from .families.registry import Family, family_name, find_family
from .families.text import TEXT_ENCODER, find_tokenizers, refuse_ids_without_rows
from .load.source import LoadedPipeline
from .lower import Backend
from .package.folder import write_tokenizers
from .passes.captured_graph import CapturedGraph, find_embeddings
from .plan import PlanSet, SizeSchedules, TailTables, make_plans
from .plan.inputs import write_plan_inputs
from .plan.sampler import SchedulerTable
from .progress import Progress
from .recipe.resolve import Recipe
from .rewrite import LayerTreatments, rewrite_pipeline
from .settle import area_tables, further_sizes, has_picture_input, sampler_table, sampler_tails, settle, settle_range
from .sites.component import Axes, Component
from .sites.guidance import add_planes
from .sites.layout import Layout


@dataclass(frozen=True, kw_only=True)
class WholePipeline:
    """A `ModelPart`: a pipeline that has a family. `size` is the default one, `further` has the others by name. `tails` are the tables of
    later starts, by number of steps; `further_schedules` what both are at the other sizes. `range` has the sizes instead where the recipe
    has one, and `area_schedules` what both are at its areas, if they differ. `sampled`: whether latents of a picture are
    drawn, and not the encoder's own."""

    stage: ClassVar[str] = "settle"
    HOISTS: ClassVar[bool] = True
    family: Family
    pipe: Any
    size: Size
    further: Mapping[str, Size]
    defaults: Defaults
    tables: Mapping[int, SchedulerTable]
    tails: Mapping[int, TailTables]
    further_schedules: Mapping[str, SizeSchedules]
    range: SizeRange | None
    area_schedules: Mapping[int, SizeSchedules]
    sampled: bool

    @classmethod
    def of(cls, recipe: Recipe, loaded: LoadedPipeline, progress: Progress) -> WholePipeline:
        """The loaded pipeline with the recipe's sizes and steps. Raises ExportError where it has no family."""
        pipe, family = loaded.pipe, find_family(loaded.pipe)
        defaults, size, steps = settle(recipe, family, loaded)
        refuse_ids_without_rows(pipe, family.prompt_entries(pipe, size))
        further, legal = further_sizes(recipe, family, pipe, size), settle_range(recipe, family, pipe, size)
        if (further or legal) and isinstance(recipe.cache, CalibratedCache) and recipe.cache.calibration:
            progress.note(
                f"cache.calibration: at every other size the cache decides as it does at {size.width}x{size.height}, evaluation by evaluation"
            )

        def schedules(of: Size) -> SizeSchedules:
            return SizeSchedules(
                tables={n: sampler_table(family, pipe, of, n, progress) for n in steps},
                tails={n: sampler_tails(recipe, family, pipe, of, n) for n in steps},
            )

        own = schedules(size)
        return cls(
            family=family,
            pipe=pipe,
            size=size,
            further=further,
            defaults=defaults,
            tables=own.tables,
            tails=own.tails,
            further_schedules={name: schedules(of) for name, of in further.items()},
            range=legal,
            area_schedules=area_tables(recipe, family, pipe, size, legal, steps),
            sampled=not has_picture_input(recipe, family) or encodes_distribution(pipe.vae),
        )

    @property
    def family_name(self) -> str:
        """The manifest's `family`."""
        return family_name(self.pipe) or ""

    def rewrite(self, recipe: Recipe, backend: Backend, progress: Progress) -> LayerTreatments:
        """Changes all modules that the recipe names."""
        if recipe.compile.channels_last_vae and not has_picture_layout(self.pipe.vae):
            name = type(self.pipe.vae).__name__
            progress.note(
                f"compile.channels_last_vae: the tensors of the vae ({name}) have five dimensions, and stay as they are"
            )
        return rewrite_pipeline(self.pipe, recipe, backend, progress)

    def denoisers(self, recipe: Recipe, backend: Backend) -> tuple[Component, ...]:
        """The denoiser with all branches of its guidance, for each size, and for each batch that the backend has graphs for."""
        made, batches = [], recipe.shapes.batch if backend.has_batch_graphs(recipe.compile) else (1,)
        for name, size in self.sizes():
            denoiser = self._denoiser_at(size, recipe)
            if self.range:
                ends = [self._denoiser_at(of, recipe) for of in self._ends()]
                denoiser = denoiser.with_range(self.range, find_input_axes(ends, self.range))
            denoiser = add_planes(denoiser) if recipe.cache.needs_planes else denoiser
            labels = {batch: batch_graph_name(size_graph_name("", name), batch) for batch in batches}
            made += [denoiser.with_batch(batch, label) for batch, label in labels.items()]
        return tuple(made)

    def _denoiser_at(self, size: Size, recipe: Recipe) -> Component:
        build = self.family.range_denoiser if self.range else self.family.denoiser
        return build(self.pipe, size, recipe.guidance)

    def _ends(self) -> list[Size]:
        """The sizes at the ends of the range."""
        assert self.range is not None
        return [replace(self.size, height=height, width=width) for height, width in self.range.corners]

    def sizes(self) -> list[tuple[str | None, Size]]:
        """(name, size) of all, the default first, which has no name."""
        return [(None, self.size), *self.further.items()]

    def other_components(self, recipe: Recipe, backend: Backend) -> tuple[Component, ...]:
        """Text encoders, and the VAE's halves for each size."""
        order = recipe.compile.channels_last_vae and backend.CHANNELS_LAST and has_picture_layout(self.pipe.vae)
        picture, made = has_picture_input(recipe, self.family), []
        build = self.family.range_components if self.range else self.family.other_components
        for name, size in self.sizes():
            components = build(self.pipe, size, channels_last=order, picture=picture)
            if self.range:
                ends = zip(
                    *(build(self.pipe, of, channels_last=order, picture=picture) for of in self._ends()), strict=True
                )
                axes = [find_input_axes(each, self.range) for each in ends]
                components = tuple(
                    c.with_range(self.range, a) if a else c for c, a in zip(components, axes, strict=True)
                )
            of_size = [c for c in components if name is None or c.name != TEXT_ENCODER]
            made += [replace(c, label=size_graph_name("", name)) for c in of_size]
        return tuple(made)

    def plan(self, recipe: Recipe, denoiser: Component, layout: Layout, calibration: Calibration | None) -> PlanSet:
        """The plans, by TeaCache's decisions where its signal is the timestep's embedding, which needs weights and no
        calibration."""
        decisions: Any = calibration
        if isinstance(recipe.cache, TeaCache) and recipe.cache.exact:
            scale = self.family.facts(self.pipe, self.size)["timestep_scale"]
            decisions = teacache.decide_by_timesteps(recipe.cache, denoiser, layout, self.tables, timestep_scale=scale)
        return make_plans(
            recipe.cache,
            layout,
            self.tables,
            decisions,
            tails=self.tails,
            further=self.further_schedules,
            areas=self.area_schedules,
        )

    def facts(self, graphs: Mapping[str, Sequence[CapturedGraph]]) -> dict[str, Any]:
        """The family's facts, where each tokenizer's ids are looked up, and what pictures it takes."""
        return self.size_facts(self.size, graphs)

    def size_entries(self, graphs: Mapping[str, Sequence[CapturedGraph]]) -> tuple[SizeEntry, ...]:
        """The further sizes, each with the facts that are others there."""
        usual, entries = self.facts(graphs), []
        for size in self.further.values():
            facts = {key: value for key, value in self.size_facts(size, graphs).items() if usual.get(key) != value}
            entries.append(SizeEntry(height=size.height, width=size.width, pipeline=facts))
        return tuple(entries)

    def legal_sizes(self) -> LegalSizes | None:
        """The range, with the latents by the size."""
        if self.range is None:
            return None
        shapes = [self.family.facts(self.pipe, size)["latents_shape"] for size in self._ends()]
        dimensions = [fit_side(numbers, self.range) for numbers in zip(*shapes, strict=True)]
        latents = tuple(int(d.constant) if d.is_constant else str(d) for d in dimensions)
        return LegalSizes(height=self.range.height, width=self.range.width, latents_shape=latents)

    def size_facts(self, size: Size, graphs: Mapping[str, Sequence[CapturedGraph]]) -> dict[str, Any]:
        """The family's facts at that size."""
        facts = self.family.facts(self.pipe, size)
        tables = {
            name: table for graph in graphs.get(TEXT_ENCODER, ()) for name, table in find_embeddings(graph).items()
        }
        prompts = [{**prompt, "embedding": tables.get(prompt["input"])} for prompt in facts["text"]["prompts"]]
        facts = {**facts, "text": {**facts["text"], "prompts": prompts}}
        if "picture" not in facts and VAE_ENCODER not in graphs:
            return facts
        usual = {"height": size.height, "width": size.width, **(self.family.PICTURE or {})}
        drawn = {} if self.sampled else {"sampled": False}
        return {**facts, "picture": {**facts.get("picture", usual), **drawn}}

    def write_files(self, folder: Path, layout: Layout, planned: PlanSet) -> None:
        """Tokenizers, and what `prebake plan` makes further plans of."""
        write_plan_inputs(folder, self.pipe.scheduler, layout, planned)
        write_tokenizers(folder, find_tokenizers(self.pipe, self.family.prompt_entries(self.pipe, self.size)))


def fit_side(numbers: Sequence[int], sizes: SizeRange) -> Dimension:
    """How a dimension follows the size that is these numbers at the ends of the range."""
    return fit_dimension((sizes.height.min, sizes.height.max), (sizes.width.min, sizes.width.max), numbers)


def find_input_axes(ends: Sequence[Component], sizes: SizeRange) -> dict[str, Axes]:
    """Input -> how it follows the size, of those that do, by the component's examples at the ends of the range."""
    found: dict[str, Axes] = {}
    for name, *tensors in zip(ends[0].inputs, *(component.args for component in ends), strict=True):
        shapes = [tensor.shape for tensor in tensors]
        dimensions = [fit_side(numbers, sizes) for numbers in zip(*shapes, strict=True)]
        if axes := {axis: d for axis, d in enumerate(dimensions) if not d.is_constant}:
            found[name] = axes
    return found


def has_picture_layout(vae: nn.Module) -> bool:
    """Whether its tensors are pictures [B, C, H, W], which may lie in channels-last order, and not videos."""
    return not any(isinstance(module, nn.Conv3d) for module in vae.modules())
