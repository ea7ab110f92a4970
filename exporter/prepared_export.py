"""What is known of an export before anything is compiled: the choices of its run, what is exported, and its graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from ..runtime.manifest import Cost, Defaults, LegalSizes, SizeEntry, Source
    from .caches.common.calibration import Calibration, PictureSize
    from .cost.count import Census
    from .export_cache.store import Store
    from .lower import Backend
    from .passes.captured_graph import CapturedGraph
    from .plan import PlanSet
    from .plan.sampler import SchedulerTable
    from .progress import Progress
    from .recipe.resolve import Recipe
    from .rewrite import LayerTreatments
    from .sites.component import Component
    from .sites.layout import Layout


class ModelPart(Protocol):
    """What of a model is exported, as a recipe's `model.part` says: the whole pipeline (`whole_pipeline.py`), or its denoiser
    alone (`denoiser_alone/part.py`). `stage` is the name of the stage that makes one of a loaded pipeline. `defaults` are a
    call's where its caller is silent; `tables` are the scheduler's, by number of steps."""

    stage: ClassVar[str]
    HOISTS: ClassVar[bool]
    """Whether its denoiser's inputs have the names by which `hoist/` knows what depends on what."""

    @property
    def pipe(self) -> Any: ...

    @property
    def size(self) -> PictureSize: ...

    @property
    def defaults(self) -> Defaults: ...

    @property
    def tables(self) -> Mapping[int, SchedulerTable]: ...

    @property
    def family_name(self) -> str:
        """The manifest's `family`."""
        ...

    def rewrite(self, recipe: Recipe, backend: Backend, progress: Progress) -> LayerTreatments:
        """Changes the modules in place as the recipe says; what happened to each Linear."""
        ...

    def denoisers(self, recipe: Recipe, backend: Backend) -> tuple[Component, ...]:
        """The denoiser for each kind of call that it gets, each size and each batch. The plans are made for the first."""
        ...

    def other_components(self, recipe: Recipe, backend: Backend) -> tuple[Component, ...]:
        """What is exported beside the denoiser, in the order of its calls."""
        ...

    def plan(self, recipe: Recipe, denoiser: Component, layout: Layout, calibration: Calibration | None) -> PlanSet:
        """The plans of every number of steps. Raises ExportError for a cache that does not fit the model."""
        ...

    def facts(self, graphs: Mapping[str, Sequence[CapturedGraph]]) -> dict[str, Any]:
        """The manifest's `pipeline` table; `graphs` are the artifact's, by component."""
        ...

    def size_entries(self, graphs: Mapping[str, Sequence[CapturedGraph]]) -> tuple[SizeEntry, ...]:
        """The manifest's `sizes`."""
        ...

    def legal_sizes(self) -> LegalSizes | None:
        """The manifest's `range`."""
        ...

    def write_files(self, folder: Path, layout: Layout, planned: PlanSet) -> None:
        """What the artifact needs beside graphs, weights and plans."""
        ...


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


@dataclass(frozen=True, kw_only=True)
class PreparedExport:
    """Everything that is known before anything is compiled: what `--dry-run` prints."""

    recipe: Recipe
    backend: Backend
    part: ModelPart
    source: Source
    layers: LayerTreatments
    calibration: Calibration | None
    layout: Layout
    planned: PlanSet
    graphs: dict[str, tuple[CapturedGraph, ...]]
    costs: dict[str, Cost]
    censuses: dict[str, Census]
