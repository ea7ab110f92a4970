"""TaylorSeer (Liu et al. 2025, arXiv:2503.06923), exactly as diffusers decides it (hooks/taylorseer_cache.py, 0.42.1).

A module computes while `step < disable_cache_before_step`, at every `cache_interval`-th step after that one, and from
`disable_cache_after_step` on; else its output is predicted as sum f_k d^k / k!, d steps after the last computed one.
f_0 is that output and f_k+1 the change of f_k since the output before, divided by the steps in between (not a divided
difference where those differ). So the prediction is linear in the last `max_order + 1` computed outputs, and its
coefficients depend on nothing but which steps computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...runtime.errors import ExportError
from ..sites.layout import Layout, Place
from ..sites.marks import Action
from ..tables import ConflictError, Regex
from .common.method import CacheMethod
from .common.schedule import Decision, Schedule, Trajectory

ATTENTION_PATTERNS = (
    "^blocks.*attn",
    "^transformer_blocks.*attn",
    "^single_transformer_blocks.*attn",
    "^temporal_transformer_blocks.*attn",
)
LITE_PREDICT_PATTERNS = ("^proj_out$",)
LITE_ZERO_PATTERNS = (r"^[^.]*block[^.]*\.[^.]+$",)

ModulePatterns = Annotated[tuple[Regex, ...], Field(strict=False)]


class TaylorSeer(CacheMethod):
    """Outputs are predicted by a Taylor series over steps; names and meaning of diffusers' `TaylorSeerCacheConfig`.

    Identifiers are regular expressions for *whole* module names. Without `cache_identifiers`, diffusers' four defaults
    say what is predicted: the `attn` of every block, and no `attn1`. What `skip_predict_identifiers` name is zero where
    it is not computed. With `use_lite_mode` the last projection is predicted and every block is zero, whatever the
    identifiers say. `taylor_factors_dtype` is what outputs are stored in. arXiv:2503.06923.
    """

    method: Literal["taylorseer"] = "taylorseer"
    cache_interval: int = Field(default=5, ge=1)
    disable_cache_before_step: int = Field(default=3, ge=0)
    disable_cache_after_step: Annotated[int, Field(ge=0)] | None = None
    max_order: int = Field(default=1, ge=0)
    taylor_factors_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    skip_predict_identifiers: ModulePatterns | None = None
    cache_identifiers: ModulePatterns | None = None
    use_lite_mode: bool = False

    @model_validator(mode="after")
    def _computes_first(self) -> TaylorSeer:
        if not self.computes(0):
            raise ConflictError(
                (
                    ("disable_cache_before_step",),
                    "disable_cache_before_step = 0 predicts the first step from nothing; set it to 1 or more",
                )
            )
        return self

    def computes(self, step: int) -> bool:
        before, after = self.disable_cache_before_step, self.disable_cache_after_step
        due = (step - before - 1) % self.cache_interval == 0
        return step < before or due or (after is not None and step >= after)

    def patterns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What is predicted, and what is zero."""
        if self.use_lite_mode:
            return LITE_PREDICT_PATTERNS, LITE_ZERO_PATTERNS
        return self.cache_identifiers or ATTENTION_PATTERNS, self.skip_predict_identifiers or ()


def schedule(cache: TaylorSeer, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """One site for each module whose whole name an identifier matches. Raises ExportError for identifiers without a site."""
    predicted, zero = find_modules(cache, layout)
    chosen = predicted + zero
    slots = cache.max_order + 1
    marks = tuple(p.mark(slots=slots, dtype=cache.taylor_factors_dtype) if p in predicted else p.mark() for p in chosen)
    actions: dict[str, Action] = {
        m.name: "combine" if p in predicted else "zero" for m, p in zip(marks, chosen, strict=True)
    }
    factors: list[list[float]] = []
    last, decisions = 0, []
    for step in range(len(trajectory.timesteps)):
        if cache.computes(step):
            factors = advance_factors(factors, step - last, cache.max_order)
            last = step
            decisions.append(Decision())
        else:
            weights = prediction_weights(factors, step - last, slots)
            decisions.append(Decision(actions, {m.name: weights for m in marks if actions[m.name] == "combine"}))
    return Schedule(marks, tuple(decisions))


def advance_factors(factors: Sequence[Sequence[float]], gap: int, max_order: int) -> list[list[float]]:
    """f_0, f_1, ... after one more computed output, `gap` steps after the one before; each as its coefficients of the
    computed outputs, newest first."""
    new = [[1.0]]
    for older in factors[:max_order]:
        pairs = zip_longest(new[-1], (0.0, *older), fillvalue=0.0)
        new.append([(now - before) / gap for now, before in pairs])
    return new


def prediction_weights(factors: Sequence[Sequence[float]], distance: int, slots: int) -> tuple[float, ...]:
    """Coefficients of the stored outputs, newest first, `distance` steps after the newest."""
    weights = [0.0] * slots
    for order, factor in enumerate(factors):
        for k, coefficient in enumerate(factor):
            weights[k] += coefficient * distance**order / math.factorial(order)
    return tuple(weights)


def find_modules(cache: TaylorSeer, layout: Layout) -> tuple[list[Place], list[Place]]:
    """The places that are predicted, and those that are zero. A module that both name is zero, as in diffusers."""
    cached, skipped = cache.patterns()
    every = layout.places + layout.others
    zero = match_places(skipped, every)
    predicted = [p for p in match_places(cached, every) if p not in zero]
    check_patterns(cache, layout, predicted)
    chosen = predicted + zero
    for inner in chosen:
        outer = next((p for p in chosen if p.branch == inner.branch and inner.name.startswith(f"{p.name}.")), None)
        if outer:
            raise ExportError(
                f"cache.cache_identifiers and cache.skip_predict_identifiers select {inner.name} inside {outer.name}, "
                "which would be predicted twice; choose the one or the other"
            )
    return predicted, zero


def match_places(patterns: Sequence[str], places: Sequence[Place]) -> list[Place]:
    return [p for p in places if any(re.fullmatch(pattern, p.name) for pattern in patterns)]


def check_patterns(cache: TaylorSeer, layout: Layout, predicted: Sequence[Place]) -> None:
    """ExportError where patterns match no whole name: the defaults together, those of a recipe or of lite mode each."""
    cached, skipped = cache.patterns()
    if not predicted and cached == ATTENTION_PATTERNS:
        raise ExportError(
            f"the default cache.cache_identifiers {list(cached)} match no whole module name; the model's attentions are "
            f"{layout.names(layout.attentions)}: name them, such as cache_identifiers = ['.*attn1']"
        )
    keys = [("cache_identifiers", p) for p in cached if cached != ATTENTION_PATTERNS]
    for key, pattern in [*keys, *(("skip_predict_identifiers", p) for p in skipped)]:
        if not match_places([pattern], layout.places + layout.others):
            asked = f"cache.use_lite_mode: {pattern!r}" if cache.use_lite_mode else f"cache.{key} {pattern!r}"
            raise ExportError(f"{asked} matches no whole module name; the model has {layout.names(layout.places)}")
