"""The calibration as a picture: sites down, evaluations across, colour for how much a value moved since the one before."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..caches.common.calibration import Calibration

MAX_LABELS = 64  # sites that are named; of more, every n-th


def draw_heatmap(calibration: Calibration, path: Path) -> bool:
    """Writes a PNG of `changes`, colours on a logarithmic scale; evaluation 0 changes from nothing and is left out.

    The file comes in one move. Of a single evaluation there is nothing to draw: no file, none from before, and False.
    """
    if len(calibration.timesteps) < 2:
        path.unlink(missing_ok=True)
        return False
    sites = list(calibration.changes)
    rows = [[math.nan if v is None else v for v in calibration.changes[site]][1:] for site in sites]
    figure = Figure(
        figsize=(3.5 + 0.22 * len(calibration.timesteps), 1.6 + 0.17 * min(len(sites), MAX_LABELS)), dpi=120
    )
    axes = figure.add_subplot()
    span = (0.5, len(calibration.timesteps) - 0.5, len(sites) - 0.5, -0.5)  # a column is centred on its evaluation
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", extent=span, norm=log_norm(rows), cmap="viridis")
    every = math.ceil(len(sites) / MAX_LABELS)
    axes.set_yticks(range(0, len(sites), every), sites[::every], fontsize=7)
    axes.set_xlabel("evaluation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"{calibration.model}, {calibration.scheduler}, {calibration.steps} steps, "
        f"{calibration.prompts * calibration.seeds} runs",
        fontsize=9,
    )
    figure.colorbar(image, label="relative change (L1) since the evaluation before")
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", bbox_inches="tight", metadata={"Software": None})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def log_norm(rows: list[list[float]]) -> LogNorm:
    """Logarithmic between the smallest and the largest change there is."""
    positive = [v for row in rows for v in row if v > 0] or [1.0]
    low, high = min(positive), max(positive)
    return LogNorm(low, high if high > low else low * 10)
