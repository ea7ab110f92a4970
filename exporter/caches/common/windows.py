"""Which attentions a diffusers attention cache takes, and in which timesteps: shared by `pab.py` and `fastercache.py`.

An attention is taken by the first group one of whose identifiers `re.search` finds in its name, self and cross apart. A
window of timesteps is open: both of its bounds lie outside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ....runtime.errors import ExportError
from ...sites.layout import Layout, Place
from ...tables import Regex


def _check_bounds(window: tuple[int, int]) -> tuple[int, int]:
    low, high = window
    if low >= high:
        raise ValueError(f"expected low < high, got [{low}, {high}]")
    return window


TimestepWindow = Annotated[tuple[int, int], Field(strict=False), AfterValidator(_check_bounds)]
Identifiers = Annotated[tuple[Regex, ...], Field(strict=False, min_length=1)]


def is_in_window(window: tuple[int, int], timestep: float) -> bool:
    return window[0] < timestep < window[1]


@dataclass(frozen=True)
class AttentionGroup:
    """Attentions that share a range and a window. `name` is the start of their keys in the recipe ("spatial_attention"),
    `default` the identifiers that a recipe has by itself: of those, any may match nothing."""

    name: str
    kind: Literal["attention", "cross_attention"]
    every: int
    window: tuple[int, int]
    identifiers: tuple[str, ...]
    default: tuple[str, ...]


def assign_groups(
    groups: Sequence[AttentionGroup], layout: Layout, places: Sequence[Place]
) -> list[tuple[AttentionGroup, Place]]:
    """Each place with its group, in order of execution. Raises ExportError for identifiers that take no attention."""
    pairs = []
    for place in places:
        group = next((g for g in groups if g.kind == place.kind and search_places(g.identifiers, [place])), None)
        pairs += [(group, place)] if group else []
    for group in groups:
        check_group(group, groups, layout, places)
    return pairs


def search_places(identifiers: Sequence[str], places: Sequence[Place]) -> list[Place]:
    return [p for p in places if any(re.search(i, p.name) for i in identifiers)]


def check_group(
    group: AttentionGroup, groups: Sequence[AttentionGroup], layout: Layout, places: Sequence[Place]
) -> None:
    """ExportError where the group, or an identifier that is not a default one, takes nothing: a silent miss skips nothing."""
    kind = "attention" if group.kind == "attention" else "cross attention"
    candidates = [p for p in places if p.kind == group.kind]
    asked = [group.identifiers] if group.identifiers == group.default else [(i,) for i in group.identifiers]
    for identifiers in asked:
        if not search_places(identifiers, candidates):
            raise ExportError(
                f"cache.{group.name}_block_identifiers {list(identifiers)} match no {kind} of the model; "
                f"it has {layout.names(layout.of(group.kind))}"
            )
    earlier = [g for g in groups[: groups.index(group)] if g.kind == group.kind]
    matched = search_places(group.identifiers, candidates)
    if all(any(search_places(g.identifiers, [p]) for g in earlier) for p in matched):
        raise ExportError(
            f"cache.{group.name}_block_identifiers {list(group.identifiers)} match only attentions that "
            f"cache.{earlier[0].name}_block_identifiers match too, and those come first: {layout.names(matched)}"
        )
