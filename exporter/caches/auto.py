"""The plan that `prebake calibrate` found for this model: what each evaluation skips, and fitted weights.

A candidate skip is "output" (nothing runs; the denoiser's output is a sum of its last ones), a range of blocks such as
"blocks[1:]" (their residual is), or "attention" (every attention output is). `calibrators/search.py` chooses among them by
the error of the final picture, which is what LeMiCa (arXiv:2511.00090) says to measure, and fits the weights.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ...runtime.errors import ExportError
from ..sites.layout import Layout
from ..sites.marks import Action, Mark
from ..tables import ConflictError, RecipeTable
from .common.calibration import CalibratedCache, FittedPlan, require_calibration
from .common.schedule import Decision, Schedule, Trajectory
from .mask import Mask


class Floor(RecipeTable):
    """The least that held-out pictures may have: mean PSNR in dB against every evaluation computed."""

    psnr: float = Field(gt=0)


class Auto(CalibratedCache):
    """`budget` is a share of the cost of computing every evaluation, such as 0.4, or a floor, `{ psnr = 40 }`: the best
    plan within the share, or the cheapest above the floor.

    For the search, and of no effect once it is done: `candidates` are what a step may skip, `slots` how many computed
    values a prediction may weigh, `max_variants` how many graphs a plan may use, `beam` how many trajectories are kept
    for each cost and age, `search_budget` the largest share that is searched, `fit_runs` and `judge_runs` how many of the
    calibration's runs plans are fitted on and judged by.

    `otherwise` is a mask for models and steps that the calibration is not of, which predicts the output along the line
    through the last two computed: without it they are refused.
    """

    method: Literal["auto"] = "auto"
    budget: Annotated[float, Field(gt=0, lt=1)] | Floor = 0.5
    candidates: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("output",)
    slots: int = Field(default=3, ge=1, le=8)
    max_variants: int = Field(default=3, ge=2)
    beam: int = Field(default=2, ge=1)
    search_budget: float = Field(default=0.6, gt=0, lt=1)
    fit_runs: int = Field(default=12, ge=1)
    judge_runs: int = Field(default=32, ge=1)
    otherwise: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _falls_back_on_a_mask(self) -> Auto:
        if self.otherwise is not None:
            self.fallback()
        return self

    def fallback(self) -> Mask:
        """`otherwise` as a cache of its own. Raises Conflicts where it is no mask."""
        assert self.otherwise is not None
        try:
            return Mask(mask=self.otherwise, order=1, site="output")
        except ValidationError as e:
            raise ConflictError(
                (("otherwise",), f"key 'otherwise': {e.errors()[0]['msg'].removeprefix('Value error, ')}")
            ) from e


def schedule(cache: Auto, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """The chosen plan's sites and decisions. Raises ExportError where no plan fits the budget."""
    chosen = choose_plan(cache, require_calibration(calibration, cache, trajectory.timesteps, "auto").auto)
    slots = max(len(w) for weights in chosen.weights for w in weights.values())
    marks_by_skip = {skip: skip_marks(skip, layout, slots) for skip in dict.fromkeys(filter(None, chosen.skips))}
    marks = tuple({m.name: m for group in marks_by_skip.values() for m in group}.values())
    decisions = tuple(
        Decision(skip_actions(marks, marks_by_skip[skip]), weights) if skip else Decision()
        for skip, weights in zip(chosen.skips, chosen.weights, strict=True)
    )
    return Schedule(marks, decisions)


def choose_plan(cache: Auto, plans: tuple[FittedPlan, ...]) -> FittedPlan:
    """The plan that is best within the budget, or cheapest above the floor, by the figures on held-out prompts."""
    if isinstance(cache.budget, Floor):
        fitting = [p for p in plans if p.held_out_psnr_db >= cache.budget.psnr]
        asked = f"at least {cache.budget.psnr:g} dB"
    else:
        fitting = [p for p in plans if p.cost <= cache.budget + 1e-9]
        asked = f"at most {cache.budget:g} of the cost"
    if not fitting:
        found = ", ".join(f"{p.cost:.2f}: {p.held_out_psnr_db:.1f} dB" for p in plans) or "none"
        raise ExportError(
            f"cache.budget: no plan of the calibration has {asked}; it has {found}. Choose one of these, or calibrate with a "
            "larger cache.search_budget"
        )
    worthy = [p for p in fitting if p.held_out_psnr_db >= p.fewer_steps_psnr_db]
    if not worthy:
        best = max(fitting, key=lambda p: p.held_out_psnr_db)
        raise ExportError(
            f"cache.budget: the best plan has {best.held_out_psnr_db:.1f} dB, and {best.fewer_steps} plain steps at no more "
            f"cost have {best.fewer_steps_psnr_db:.1f}; take cache.method=none and sampler.steps={best.fewer_steps}"
        )
    cheapest = isinstance(cache.budget, Floor)
    return min(worthy, key=lambda p: p.cost) if cheapest else max(worthy, key=lambda p: p.held_out_psnr_db)


def skip_marks(skip: str, layout: Layout, slots: int) -> tuple[Mark, ...]:
    """The sites that a candidate predicts, of every branch. Raises ExportError for one that the model does not have."""
    if skip == "output":
        return (layout.output(slots=slots),)
    if skip == "attention":
        marks = tuple(a.mark(slots=slots) for a in layout.attentions)
    else:
        parts = re.fullmatch(r"blocks\[(-?\d*):(-?\d*)\]", skip)
        if not parts:
            raise ExportError(f"cache.candidates: expected 'output', 'attention' or 'blocks[start:stop]', got {skip!r}")
        bounds = slice(*(int(b) if b else None for b in parts.groups()))
        count = len(layout.blocks(layout.branches[0]))
        chosen = range(count)[bounds]
        marks = tuple(layout.residual(b, chosen.start, chosen.stop, slots=slots) for b in layout.branches if chosen)
    if not marks:
        blocks = len(layout.blocks(layout.branches[0]))
        raise ExportError(
            f"cache.candidates: {skip!r} selects nothing; the model has {blocks} transformer blocks and "
            f"{len(layout.attentions)} attentions, and 'output' always exists"
        )
    return marks


def skip_actions(marks: tuple[Mark, ...], skipped: tuple[Mark, ...]) -> dict[str, Action]:
    """These sites are predicted; the others run, and what they give beside a prediction is not stored."""
    return {m.name: "combine" if m in skipped else "pass" for m in marks}
