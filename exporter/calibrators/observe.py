"""One uncached trajectory, watched: how every site's value changes from evaluation to evaluation, as numbers.

The sites are all attentions, feed-forwards, what each block and each branch's whole stack of blocks adds, and the
denoiser's output. Values live for as many evaluations as the comparisons reach back, and numbers alone come out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from ..caches.smoothcache import find_components
from ..plan.sampler import SchedulerTable
from ..sites.actions import VariantModule
from ..sites.component import Component
from ..sites.layout import Layout, Place
from ..sites.marks import Mark, Variant
from .dynamic_replay import SamplerLoop
from .magnitudes import magnitude_ratio

SiteValues = tuple[Tensor, ...]
MIN_SIZE = 1e-30  # a change of what was zero before is large, and still a number


@dataclass(frozen=True)
class SiteFigures:
    """One run's figures, as in `Calibration`; `errors` are by site."""

    changes: dict[str, list[float | None]]
    magnitudes: dict[str, list[float]]
    errors: dict[str, list[tuple[float, ...]]]


def mark_layout(layout: Layout) -> tuple[Mark, ...]:
    """The sites whose changes are recorded, in the order in which they return."""
    kinds = ("attention", "cross_attention", "feed_forward", "block")
    return (*(mark_place(p) for p in layout.of(*kinds)), *mark_block_stacks(layout).values(), layout.output())


def mark_place(place: Place) -> Mark:
    """A module's output; of a block that hands its inputs on, what it adds to them."""
    return place.mark(residual=place.kind == "block" and "output" not in place.streams)


def mark_block_stacks(layout: Layout) -> dict[str, Mark]:
    """Branch -> what all its blocks together add to the hidden states; nothing for a model without blocks of its own."""
    found = {}
    for branch in layout.branches:
        if count := len(layout.blocks(branch)):
            mark = layout.residual(branch, 0, count)
            if "hidden_states" in mark.streams:
                found[branch] = replace(mark, stored_streams=(mark.streams.index("hidden_states"),))
    return found


def observe_trajectory(
    component: Component,
    layout: Layout,
    table: SchedulerTable,
    inputs: Mapping[str, Tensor],
    latents: Tensor,
    *,
    lookahead: int,
    timestep_scale: float = 1.0,
    noise: Iterable[Tensor] = (),
) -> SiteFigures:
    """The figures of the trajectory that starts at `latents`; errors reach back `lookahead` evaluations."""
    marks = mark_layout(layout)
    module = VariantModule(component.module, marks, Variant("full", ()), component.inputs)
    compared = {p.site for places in find_components(layout).values() for p in places}
    whole = {branch: mark.name for branch, mark in mark_block_stacks(layout).items()}
    past = {m.name: deque[SiteValues](maxlen=lookahead if m.name in compared else 1) for m in marks}
    seen = SiteFigures({m.name: [] for m in marks}, {branch: [] for branch in whole}, {site: [] for site in compared})
    loop = SamplerLoop(table, inputs, latents, timestep_scale=timestep_scale, noise=noise)
    for _ in table.updates:
        call = loop.inputs()
        with torch.no_grad():
            result = dict(zip(module.outputs, module(*(call[n] for n in component.inputs)), strict=True))
        values = {m.name: tuple(result[t] for t in m.tensors) for m in marks}
        for branch, site in whole.items():
            before = past[site]
            seen.magnitudes[branch].append(magnitude_ratio(before[0][0], values[site][0]) if before else 1.0)
        for site, now in values.items():
            record_figures(seen, site, now, past[site])
        loop.advance(result["sample"])
    return seen


def record_figures(seen: SiteFigures, site: str, now: SiteValues, past: deque[SiteValues]) -> None:
    """Adds one evaluation's figures of one site; `past` holds its values before, newest first, and then this one."""
    seen.changes[site].append(relative_change(now, past[0], over=past[0]) if past else None)
    if site in seen.errors:
        seen.errors[site].append(tuple(relative_change(now, before, over=now) for before in past))
    past.appendleft(now)


def relative_change(a: SiteValues, b: SiteValues, *, over: SiteValues) -> float:
    """sum|a - b| / sum|over|, all tensors of a site together."""
    moved = sum(float((x.float() - y.float()).abs().sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))
    size = sum(float(x.float().abs().sum(dtype=torch.float64)) for x in over)
    return moved / max(size, MIN_SIZE)


def average_components(
    layout: Layout, errors: Mapping[str, Sequence[tuple[float, ...]]]
) -> dict[str, list[tuple[float, ...]]]:
    """SmoothCache's components: every site, and for each leaf name of a branch the mean over its sites."""
    groups = find_components(layout)
    means = {name: mean_rows([errors[p.site] for p in places]) for name, places in groups.items()}
    return {**{site: list(rows) for site, rows in errors.items()}, **means}


def mean_rows(tables: Sequence[Sequence[tuple[float, ...]]]) -> list[tuple[float, ...]]:
    """Entry by entry, the mean of equally shaped tables."""
    return [tuple(map(fmean, zip(*rows, strict=True))) for rows in zip(*tables, strict=True)]
