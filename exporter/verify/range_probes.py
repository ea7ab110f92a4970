"""Which sizes of a range an artifact is held against its pipeline at, besides the default one: plans of their own names."""

from __future__ import annotations

from collections.abc import Mapping

from ...runtime.artifact import Artifact
from ...runtime.families import Family
from ...runtime.manifest import Manifest
from ...runtime.pipeline import Pipeline
from ...runtime.plan import Plan
from ...runtime.sizes.size_range import SizeRange


def probe_sizes(sizes: SizeRange, default: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The smallest (height, width), and one in the middle with sides as different as a quarter of the range makes them; none of them the
    default one."""
    heights, widths = sizes.height.values, sizes.width.values
    between = heights[len(heights) // 4], widths[3 * len(widths) // 4]
    smallest = sizes.height.min, sizes.width.min
    return tuple(size for size in dict.fromkeys((smallest, between)) if size != default)


def plans_with_probes(artifact: Artifact) -> dict[str, Plan]:
    """The artifact's plans by name, each also at the probes of its range."""
    return add_probes(artifact.plans, artifact.manifest)


def add_probes(plans: Mapping[str, Plan], manifest: Manifest) -> dict[str, Plan]:
    """Those plans by name, each also at the probes of the artifact's range."""
    if manifest.range is None:
        return dict(plans)
    default = manifest.defaults.height, manifest.defaults.width
    probes = [plan.at(*size) for plan in plans.values() for size in probe_sizes(manifest.range, default)]
    return {**plans, **{plan.name: plan for plan in probes}}


def choose_family(pipe: Pipeline, size: str | None) -> Family:
    """The family's rules at the size of that name, listed or of a range; None = the default one."""
    listed: Mapping[str | None, Family] = {family.size: family for family in pipe.families}
    if size in listed:
        return listed[size]
    assert size is not None
    width, _, height = size.partition("x")
    return pipe.family_rules.at(int(height), int(width))
