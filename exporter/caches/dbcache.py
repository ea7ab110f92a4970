"""DBCache, cache-dit's dual block cache: in each list of blocks the first ones always run and say whether the middle may
be skipped; the last ones always run on what stands in for it.

The residual that the first `Fn_compute_blocks` add to the image is compared with the one of the last computed evaluation;
where it moved less than `residual_diff_threshold`, the middle's last residual is added again, or forecast from the last
few (TaylorSeer, FoCa). Lists of one model (FLUX's double and single blocks) decide apart. The order of the tests and every
counter are those of cache-dit 1.5.3 (`caching/cache_contexts/cache_manager.py`, `can_cache`). Decisions are data: they are
calibrated and frozen, unless a mask with the policy "static", or a threshold of 1 or more, leaves none to make. DBPrune,
which decides block by block, is not offered: nearly every evaluation would be a variant of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...runtime.errors import ExportError, RecipeError
from ..sites.layout import Layout
from ..sites.marks import Mark
from ..tables import ConflictError
from .common.calibration import FrozenCache, freeze_decisions
from .common.schedule import Decision, Schedule, Trajectory

FOCA_HORIZON = 3
"""FoCa reaches this many evaluations ahead, and no further."""

FOCA_SLOTS = 32
"""How far back FoCa can look while a rule decides online and no limit on consecutive cached steps is set."""


class DBCache(FrozenCache):
    """The middle blocks of each list are skipped while what the first blocks add stays close to what it was.

    Names, meaning and defaults of cache-dit's `DBCacheConfig`; `calibrator_type` and the keys below it are those of its
    `TaylorSeerCalibratorConfig` and `FoCaCalibratorConfig`, which forecast the text's states as well. Steps are
    evaluations. `enable_separate_cfg` lets the two branches of guidance decide apart; without it they decide together.
    """

    method: Literal["dbcache"] = "dbcache"
    Fn_compute_blocks: int = Field(default=8, ge=1)
    Bn_compute_blocks: int = Field(default=0, ge=0)
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = Field(default=8, ge=0)
    warmup_interval: int = Field(default=1, ge=1)
    max_cached_steps: int = Field(default=-1, ge=-1)
    max_continuous_cached_steps: int = Field(default=-1, ge=-1)
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    num_inference_steps: int | None = Field(default=None, ge=1)
    steps_computation_mask: Annotated[tuple[Literal[0, 1], ...], Field(strict=False, min_length=1)] | None = None
    steps_computation_policy: Literal["dynamic", "static"] = "dynamic"
    force_refresh_step_hint: int | None = Field(default=None, ge=1)
    force_refresh_step_policy: Literal["once", "repeat"] = "once"
    calibrator_type: Literal["taylorseer", "foca", "dmd"] | None = None
    calibrator_cache_type: Literal["residual", "hidden_states"] = "residual"
    taylorseer_order: int = Field(default=1, ge=0, le=4)

    @model_validator(mode="after")
    def _can_be_planned(self) -> DBCache:
        problems = []
        if self.calibrator_type == "dmd":
            problems.append(
                (
                    ("calibrator_type",),
                    "key 'calibrator_type': 'dmd' fits its coefficients to the stored values at run time, so no plan can hold them; "
                    "use 'taylorseer' or 'foca'",
                )
            )
        if self.enable_separate_cfg and self.cfg_compute_first and self.cfg_diff_compute_separate:
            problems.append(
                (
                    ("cfg_compute_first", "cfg_diff_compute_separate"),
                    "key 'cfg_compute_first': expected false where cfg_diff_compute_separate is true",
                )
            )
        if self.static and self.steps_computation_mask and not self.steps_computation_mask[0]:
            problems.append(
                (
                    ("steps_computation_mask", "steps_computation_policy"),
                    "key 'steps_computation_mask': skips the first step, when there is nothing to reuse; start it with 1",
                )
            )
        if self.enable_separate_cfg and (self.force_refresh_step_hint or 0) % 2:
            problems.append(
                (
                    ("force_refresh_step_hint", "enable_separate_cfg"),
                    f"key 'force_refresh_step_hint': counts the calls of both branches, so expected an even number, got "
                    f"{self.force_refresh_step_hint}",
                )
            )
        if problems:
            raise ConflictError(*problems)
        return self

    @property
    def static(self) -> bool:
        """Whether a mask decides, and the data nothing."""
        return self.steps_computation_mask is not None and self.steps_computation_policy == "static"

    @property
    def data_free(self) -> bool:
        """Whether no decision depends on the data."""
        return self.static or not 0 < self.residual_diff_threshold < 1

    def warm_up(self) -> range:
        """The steps that always compute; a mask cuts them to the ones that it starts with."""
        stop = self.max_warmup_steps
        if self.steps_computation_mask is not None:
            stop = min(stop, [*self.steps_computation_mask, 0].index(0))
        return range(0, stop, self.warmup_interval)

    def begin(self, e: int) -> int:
        """The evaluation at which the memory that e looks back on was last cleared."""
        every = self.force_refresh_step_hint
        if every is None:
            return 0
        every = every // 2 if self.enable_separate_cfg else every
        if self.force_refresh_step_policy == "once":
            return every if e >= every else 0
        return e - e % every


@dataclass
class DBCacheRule:
    """cache-dit's tests in their order, and its counters, for one list of blocks in one branch."""

    cache: DBCache
    cached: int = 0
    streak: int = 0
    accumulated: float = 0.0

    def computes(self, e: int, diff: Callable[[], float] | None) -> bool:
        """Whether evaluation e computes; called once for each, in order. `diff()` is the relative change since the last
        computed one, and None where nothing was computed yet: called only if it is looked at."""
        begin = self.cache.begin(e)
        if e == begin:
            self.cached, self.streak, self.accumulated, diff = 0, 0, 0.0, None
        skips = self.may_skip(e - begin, diff)
        self.cached += skips
        self.streak = self.streak + 1 if skips else 0
        return not skips

    def may_skip(self, step: int, diff: Callable[[], float] | None) -> bool:
        c = self.cache
        if step in c.warm_up():
            return False
        if c.steps_computation_mask is not None:
            if 1 in c.steps_computation_mask[step : step + 1]:
                return False
            if c.steps_computation_policy == "static":
                return True
        if 0 <= c.max_cached_steps <= self.cached or 0 <= c.max_continuous_cached_steps <= self.streak:
            return False
        if 0 < (c.max_accumulated_residual_diff_threshold or 0) <= self.accumulated:
            return False
        if c.residual_diff_threshold <= 0 or diff is None:
            return False
        if c.residual_diff_threshold >= 1:
            return True
        moved = diff()
        self.accumulated += max(moved, 0.0)
        return moved < c.residual_diff_threshold


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of one branch: its `key` among decisions, and where it lies among all blocks of the branch."""

    key: str
    name: str
    branch: str
    start: int
    count: int


def find_block_lists(cache: DBCache, layout: Layout) -> tuple[BlockList, ...]:
    """The lists of blocks that have a middle to skip, list by list in order of execution, and branch by branch in each.

    Raises ExportError where a list has fewer blocks than always run, and where no list has more.
    """
    names = dict.fromkeys(p.name.rpartition(".")[0] for p in layout.of("block"))
    found = [find_block_list(layout, branch, name) for name in names for branch in layout.branches]
    sizes = ", ".join(dict.fromkeys(f"{b.name} has {b.count}" for b in found)) or "the model has no lists of blocks"
    always = cache.Fn_compute_blocks + cache.Bn_compute_blocks
    if any(b.count < always for b in found) or not any(b.count > always for b in found):
        raise ExportError(
            f"cache.Fn_compute_blocks {cache.Fn_compute_blocks} and cache.Bn_compute_blocks {cache.Bn_compute_blocks} always run; "
            f"expected no more blocks than the shortest list has, and fewer than the longest ({sizes})"
        )
    return tuple(b for b in found if b.count > always)


def find_block_list(layout: Layout, branch: str, name: str) -> BlockList:
    """The list of that name. Raises ExportError where other blocks run between its own, so that it has no middle."""
    inside = [i for i, p in enumerate(layout.blocks(branch)) if p.name.rpartition(".")[0] == name]
    if inside[-1] - inside[0] >= len(inside):
        raise ExportError(
            f"cache.method 'dbcache' skips the middle of each list of blocks, and blocks of other lists run between those of "
            f"{name}; the model runs {layout.names(layout.blocks(branch))}"
        )
    return BlockList(f"{branch}/{name}" if branch else name, name, branch, inside[0], len(inside))


def marks(cache: DBCache, layout: Layout) -> tuple[Mark, ...]:
    """The sites of what the middle of each list adds, or, with calibrator_cache_type "hidden_states", returns."""
    chosen = tuple(mark_middle(cache, layout, b) for b in find_block_lists(cache, layout))
    if cache.calibrator_type == "foca":
        longest = cache.max_continuous_cached_steps
        return set_slots(chosen, 2 * longest + 1 if longest >= 0 else FOCA_SLOTS)
    return chosen


def mark_middle(cache: DBCache, layout: Layout, b: BlockList) -> Mark:
    first, end = cache.Fn_compute_blocks, b.count - cache.Bn_compute_blocks
    slots = cache.taylorseer_order + 1 if cache.calibrator_type == "taylorseer" else 1
    mark = layout.residual(b.branch, b.start + first, b.start + end, name=f"{b.name}[{first}:{end}]", slots=slots)
    whole = cache.calibrator_type is not None and cache.calibrator_cache_type == "hidden_states"
    return replace(mark, residual=not whole, emitted=cache.calibrator_type == "foca")


def set_slots(chosen: Iterable[Mark], slots: int) -> tuple[Mark, ...]:
    return tuple(replace(m, slots=max(2, slots)) for m in chosen)


def decision(cache: DBCache, layout: Layout, history: Sequence[Mapping[str, bool]]) -> Decision:
    """At the last entry of `history` the lists that do not compute are forecast from what they computed before."""
    chosen = zip(find_block_lists(cache, layout), marks(cache, layout), strict=True)
    return forecast_decision(cache, {mark: [h.get(b.key, True) for h in history] for b, mark in chosen})


def forecast_decision(cache: DBCache, histories: Mapping[Mark, Sequence[bool]]) -> Decision:
    """The decision at the last evaluation of each site's own history."""
    skipped = {m.name: forecast_weights(cache, h, m.slots) for m, h in histories.items() if not h[-1]}
    return Decision(dict.fromkeys(skipped, "combine"), skipped)


def forecast_weights(cache: DBCache, computed: Sequence[bool], slots: int) -> tuple[float, ...]:
    """The weights of the stored generations, newest first, at the last evaluation of `computed`, which skips.

    Raises ExportError for a forecast that looks back further than there are slots.
    """
    recent = computed[cache.begin(len(computed) - 1) :]
    if cache.calibrator_type == "foca":
        weights = foca_weights(recent)
    else:
        weights = taylor_weights(recent, cache.taylorseer_order if cache.calibrator_type else 0)
    if len(weights) > slots:
        raise ExportError(
            f"cache.calibrator_type 'foca': a forecast looks {len(weights)} evaluations back, and {slots} are kept; set "
            "cache.max_continuous_cached_steps"
        )
    return weights + (0.0,) * (slots - len(weights))


def taylor_weights(computed: Sequence[bool], order: int) -> tuple[float, ...]:
    """cache-dit's TaylorSeer: sum_i d^i / i! f_i, f_0 the last computed value and f_i+1 the change of f_i per evaluation.

    Its clock starts with its first value and so is one evaluation behind: there is no f_1 before evaluation 3. A
    generation is what was computed. Each f_i is a combination of those, written as {evaluation: weight}.
    """
    factors: list[dict[int, float]] = []
    last = 0
    for e in (e for e, c in enumerate(computed[:-1]) if c):
        fresh = [{e: 1.0}]
        for before in factors[:order] if e > 2 else ():
            fresh.append(scaled_difference(fresh[-1], before, e - last))
        factors, last = fresh, e
    ahead = len(computed) - 1 - last
    total: dict[int, float] = {}
    for i, factor in enumerate(factors):
        for e, w in factor.items():
            total[e] = total.get(e, 0.0) + w * ahead**i / math.factorial(i)
    made = [e for e, c in enumerate(computed[:-1]) if c]
    return tuple(total.get(e, 0.0) for e in reversed(made[-order - 1 :]))


def scaled_difference(a: Mapping[int, float], b: Mapping[int, float], length: int) -> dict[int, float]:
    return {e: (a.get(e, 0.0) - b.get(e, 0.0)) / length for e in {**a, **b}}


def foca_weights(computed: Sequence[bool]) -> tuple[float, ...]:
    """cache-dit's FoCa: y_s + d/2 ((y_s - y_s') + (v_1 - v_2)), computed at s and s' before it, and v_1, v_2 the last two
    values that were computed or forecast, which are the generations. Slopes are per value and not per evaluation, and d
    is at most 3, beyond which the step shrinks again as 9 / d."""
    now = len(computed) - 1
    made = [e for e in range(now) if computed[e]]
    if len(made) < 2:
        return (1.0,)  # the last forecast is the one computed value
    last, before = made[-1], made[-2]
    ahead = now - last
    half = ahead / 2 if ahead <= FOCA_HORIZON else FOCA_HORIZON**2 / (2 * ahead)
    weights = [0.0] * max(now - before, 2)
    for e, w in ((last, 1 + half), (before, -half), (now - 1, half), (now - 2, -half)):
        weights[now - 1 - e] += w
    return tuple(weights)


def schedule(cache: DBCache, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """The mask's decisions, or those of at least `cache.quorum` of the calibration's runs, list by list.

    Raises RecipeError for a mask or num_inference_steps of another length, ExportError without a calibration that fits.
    """
    evaluations = len(trajectory.timesteps)
    check_length(cache, evaluations)
    keys = [b.key for b in find_block_lists(cache, layout)]
    if cache.data_free:
        rule = DBCacheRule(cache)
        history = tuple(
            dict.fromkeys(keys, rule.computes(e, None if e == 0 else lambda: 0.0)) for e in range(evaluations)
        )
    else:
        history = freeze_decisions(calibration, cache, keys, trajectory.timesteps)
    chosen = marks(cache, layout)
    if cache.calibrator_type == "foca":  # as deep as these decisions look back, and no deeper
        chosen = set_slots(chosen, evaluations)
    columns = dict(zip(chosen, ([h[k] for h in history] for k in keys), strict=True))
    decisions = [forecast_decision(cache, {m: c[: e + 1] for m, c in columns.items()}) for e in range(evaluations)]
    if cache.calibrator_type == "foca":
        depth = max((count_used_slots(w) for d in decisions for w in d.coefficients.values()), default=1)
        chosen = set_slots(chosen, depth)
        cut = chosen[0].slots
        decisions = [Decision(d.actions, {n: w[:cut] for n, w in d.coefficients.items()}) for d in decisions]
    return Schedule(chosen, tuple(decisions))


def count_used_slots(weights: Sequence[float]) -> int:
    """How many slots these weights read."""
    return max(k + 1 for k, w in enumerate(weights) if w)


def check_length(cache: DBCache, evaluations: int) -> None:
    mask, steps = cache.steps_computation_mask, cache.num_inference_steps
    if mask is not None and len(mask) != evaluations:
        raise RecipeError(
            f"cache.steps_computation_mask is for {len(mask)} evaluations, and the plan has {evaluations}; give it one entry each"
        )
    if steps is not None and steps != evaluations:
        raise RecipeError(
            f"cache.num_inference_steps is {steps}, and the plan has {evaluations} evaluations; leave it out"
        )
