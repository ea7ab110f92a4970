"""An explicit mask over steps: where it says 0, a range of blocks is not run and its residual is predicted.

Order 0 adds the last computed residual again (FORA's and MagCache's reuse). Order 1 continues the line through the last
two, over timesteps: r(t) = r_a + (t - a) / (a - b) (r_a - r_b), computed at a and before that at b. Unlike TaylorSeer's
index distance this stays a line on schedules whose steps are not equally long.
"""

from __future__ import annotations

from typing import Any

from ....runtime.errors import ExportError
from ...sites import Mark
from . import Decision, Layout, Schedule


def schedule(cache: Any, layout: Layout, timesteps: tuple[float, ...], sigmas: tuple[float, ...]) -> Schedule:
    """One site, the residual of `cache.blocks`, computed where `cache.mask` says 1."""
    mark = residual(cache, layout)
    computed: list[float] = []
    decisions = []
    for compute, t in zip(cache.expand(len(timesteps)), timesteps, strict=True):
        if compute:
            computed.append(t)
            decisions.append(Decision({mark.name: "compute"}, {}))
        else:
            decisions.append(Decision({mark.name: "combine"}, {mark.name: prediction(cache.order, t, computed)}))
    return Schedule((mark,), tuple(decisions))


def residual(cache: Any, layout: Layout) -> Mark:
    """The site of the slice `cache.blocks`, such as ":" or "1:-1". Raises ExportError when it is empty."""
    bounds = [int(bound) if bound else None for bound in cache.blocks.split(":")]
    chosen = range(len(layout.blocks))[slice(*bounds)]
    if not chosen:
        raise ExportError(
            f"cache.blocks {cache.blocks!r} selects none of the model's {len(layout.blocks)} blocks; ':' is all of them"
        )
    return Mark(
        f"blocks[{chosen.start}:{chosen.stop}]",
        layout.blocks[chosen.start : chosen.stop],
        layout.streams,
        residual=True,
        slots=cache.order + 1,
    )


def prediction(order: int, t: float, computed: list[float]) -> tuple[float, ...]:
    """Weights of the stored residuals, newest first, at timestep `t`."""
    if order == 0:
        return (1.0,)
    a, b = computed[-1], computed[-2]
    reach = (t - a) / (a - b)
    return (1.0 + reach, -reach)
