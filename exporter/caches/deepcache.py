"""DeepCache (Ma et al. 2023, arXiv:2312.00858): most steps run only a UNet's outermost layers, over a stored deep feature.

The one thing stored is the input of the up layer at which such a step enters, that is the output of the module that ran
just before it: everything deeper feeds nothing else and is pruned, while the skip connections that the remaining up layers
read are computed anew. The DeepCache package's helper (0.1.1, extension/deepcache.py) keeps every skipped module's
output instead and gives the same numbers; the paper's own UNets (DeepCache/sd/unet_2d_condition.py) keep this one tensor.

The non-uniform schedules are those of `sample_from_quad` and `sample_from_quad_center` in
github.com/horseee/DeepCache, DeepCache/sd/pipeline_stable_diffusion.py (1691a3a); the helper has names for them and no code.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ...runtime.errors import ExportError, RecipeError
from ..sites.layout import Layout, Place
from ..sites.marks import Mark
from ..tables import ConflictError
from .common.method import CacheMethod
from .common.schedule import Decision, Schedule, Trajectory

UP_LAYER = re.compile(r"up_blocks\.\d+\.resnets\.\d+")


class DeepCache(CacheMethod):
    """One evaluation in `cache_interval` is whole; the others run the UNet's outermost layers. arXiv:2312.00858.

    `cache_branch_id` counts the UNet's up layers from the last one inwards, and the others enter there: 0 is the cheapest.
    With three up layers a block (SD, SDXL) these are the ids of the DeepCache package, which always divides by 3; with
    `numbering = "package"` they are its ids on every model.
    `skip_mode` says where the whole evaluations lie: "uniform"; "pow", closer together at the start; "center", closer
    together around evaluation `center`. The power `pow` is lowered by 0.02 until that many different evaluations result.
    """

    method: Literal["deepcache"] = "deepcache"
    cache_interval: int = Field(default=1, ge=1)
    cache_branch_id: int = Field(default=0, ge=0)
    numbering: Literal["layers", "package"] = "layers"
    skip_mode: Literal["uniform", "pow", "center"] = "uniform"
    pow: float = Field(default=1.2, gt=1)
    center: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _keys_are_of_the_mode(self) -> DeepCache:
        problems = []
        if self.skip_mode == "center" and self.center is None:
            problems.append(
                (
                    ("center",),
                    "key 'center': skip_mode = \"center\" needs the evaluation to be dense at, such as center = 15",
                )
            )
        if self.skip_mode != "center" and self.center is not None:
            problems.append(
                (
                    ("center", "skip_mode"),
                    f'key \'center\': skip_mode = "{self.skip_mode}" has no center; set skip_mode = "center"',
                )
            )
        if self.skip_mode == "uniform" and "pow" in self.model_fields_set:
            problems.append(
                (
                    ("pow", "skip_mode"),
                    'key \'pow\': skip_mode = "uniform" has no power; set skip_mode = "pow" or "center"',
                )
            )
        if problems:
            raise ConflictError(*problems)
        return self


def schedule(cache: DeepCache, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """One site in each branch of guidance. The phase goes by evaluation, as in the paper's code.

    The helper looks the timestep up in the scheduler's list instead: the same, unless a timestep occurs twice (Heun, PNDM).
    """
    marks = tuple(mark_entry(cache, layout, branch) for branch in layout.branches)
    whole = whole_evaluations(cache, len(trajectory.timesteps))
    reuse = Decision.reuse(*marks)
    return Schedule(marks, tuple(Decision() if e in whole else reuse for e in range(len(trajectory.timesteps))))


def mark_entry(cache: DeepCache, layout: Layout, branch: str) -> Mark:
    """The site of what flows into the up layer of `cache_branch_id`. Raises ExportError with the valid ids."""
    branch_id = cache.cache_branch_id
    places = [p for p in layout.places if p.branch == branch]
    layers = up_layers(places)
    if not layers:
        raise ExportError(
            "cache.method 'deepcache' is for UNets: the model has no up_blocks with resnets; choose a method for transformers"
        )
    known = dict(enumerate(layers)) if cache.numbering == "layers" else package_layers(layers)
    if branch_id not in known:
        raise ExportError(
            f"cache.cache_branch_id {branch_id} is not an up layer of the model; it has "
            + ", ".join(f"{b} = {p.name}" for b, p in known.items())
        )
    layer = known[branch_id]
    before = (p for p in reversed(places[: places.index(layer)]) if not p.name.startswith(f"{layer.name}."))
    return next(before).mark()


def up_layers(places: list[Place]) -> list[Place]:
    """The layers of a UNet's way up that read skip connections, the last to run first."""
    return [p for p in reversed(places) if UP_LAYER.fullmatch(p.name)]


def package_layers(layers: list[Place]) -> dict[int, Place]:
    """The layers by the ids of the DeepCache package: layer `id % 3` of block `id // 3`, both counted from the last to run.

    A block of fewer than three layers is entered at its first to run by the ids that are too large for it; one of more has
    layers without an id.
    """
    blocks: dict[str, list[Place]] = {}
    for layer in layers:
        blocks.setdefault(layer.name.partition(".resnets.")[0], []).append(layer)
    return {3 * b + i: own[min(i, len(own) - 1)] for b, own in enumerate(blocks.values()) for i in range(3)}


def whole_evaluations(cache: DeepCache, count: int) -> frozenset[int]:
    """Which of `count` evaluations are computed whole: the first, and `ceil(count / cache_interval)` in all."""
    every = cache.cache_interval
    if cache.skip_mode == "uniform" or every == 1:
        return frozenset(range(0, count, every))
    samples = -(-count // every)
    power = cache.pow
    while power > 1:
        chosen = (
            sample_from_quad(count, samples, power)
            if cache.center is None
            else sample_from_quad_center(count, samples, cache.center, power)
        )
        if len(chosen) == samples:
            return frozenset(chosen)
        power -= 0.02
    raise RecipeError(
        f"cache.skip_mode {cache.skip_mode!r}: no power between 1 and {cache.pow} places {samples} whole evaluations among "
        f"{count}; change cache.pow, cache.center or cache.cache_interval"
    )


def sample_from_quad(count: int, samples: int, power: float) -> list[int]:
    """`samples` points evenly spaced in x, at x ** power: dense at 0. numpy, because the original's last bits decide."""
    points = np.linspace(0, count ** (1 / power), samples + 1)
    return sorted({int(x) for x in points**power})[:-1]


def sample_from_quad_center(count: int, samples: int, center: int, power: float) -> list[int]:
    """`samples` points that are dense around `center`, and 0 first.

    `-center` has a complex root; the original raises it to the power again and takes the real part.
    """
    points = np.linspace((-center) ** (1 / power), (count - center) ** (1 / power), samples + 1)
    return [0, *(x + center for x in sorted({int(x.real) for x in points**power})[1:-1])]
