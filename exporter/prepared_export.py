"""What is known before anything is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.manifest import Cost, Defaults, Source
    from .caches.common.calibration import Calibration
    from .denoiser_alone.recording import PipelineRecording
    from .passes.captured_graph import CapturedGraph
    from .plan import PlanSet
    from .recipe.resolve import Recipe
    from .rewrite import LayerTreatments
    from .sites.layout import Layout


@dataclass(frozen=True)
class PreparedExport:
    """Everything that is known before anything is compiled: what `--dry-run` prints. `recording` is there where the denoiser
    is exported alone (`alone.py`), and then `family` is not."""

    recipe: Recipe
    family: Any
    pipe: Any
    size: Any
    source: Source
    defaults: Defaults
    layers: LayerTreatments
    calibration: Calibration | None
    layout: Layout
    planned: PlanSet
    graphs: dict[str, tuple[CapturedGraph, ...]]
    costs: dict[str, Cost]
    recording: PipelineRecording | None = None
