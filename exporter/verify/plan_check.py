"""Plan check: every number of an artifact's plans against the same number made anew.

Evaluations at equal inputs do not see the scheduler's coefficients, and the spread of pictures hides one of fifty that is wrong by 1 %. So
the plans are rebuilt: the pipeline's own scheduler is run once more, and the recipe's cache decides once more. It takes no evaluation of
a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.errors import ArtifactError, ExportError, RecipeError
from ...runtime.manifest import Manifest
from ...runtime.plan import PLAN_INPUTS_FILE, Evaluation, Plan
from ..caches import NoCache
from ..caches.common.calibration import CALIBRATION_FILE
from ..plan.inputs import read_plan_inputs
from ..progress import Progress
from ..recipe.resolve import Recipe
from ..replan.rebuild import build_plans
from .outcome import Verdict
from .range_probes import add_probes

PLAN_TOLERANCE = 1e-4  # relative; another machine's float32 schedule differs by 1e-7
LEAST_NUMBER = 1e-6  # of the largest of its row: less is rounding


def judge_plans(
    folder: Path, manifest: Manifest, recipe: Recipe, plans: Mapping[str, Plan], scheduler: Any
) -> tuple[tuple[Verdict, ...], tuple[str, ...]]:
    """A verdict for each plan of the recipe's scheduler, which is given as the pipeline has it, and sentences on what could not be made
    anew."""
    if PLAN_INPUTS_FILE not in {entry.path for entry in manifest.files}:
        return (), ()
    verdicts, gaps = [], []
    for steps in sorted({plan.steps for plan in plans.values()}):
        fresh, problem = rebuild_plans(folder, manifest, recipe, steps, scheduler)
        for name, plan in plans.items():
            if plan.steps != steps:
                continue
            same = fresh.get(name) or fresh.get(name.replace("-uncached", "", 1))
            if same is None:
                gaps.append(
                    f"the numbers of plan {name} were not made anew: {problem or 'the recipe has no such plan'}"
                )
                continue
            decided = [e.variant for e in same.evaluations] == [e.variant for e in plan.evaluations]
            if not decided:
                gaps.append(
                    f"what the cache of plan {name} multiplies with was not made anew: "
                    f"{problem or 'it is not the cache of the recipe'}; its scheduler was"
                )
            value = plan_error(plan, same, with_cache=decided)
            over = f"of {len(plan.evaluations)} evaluations made anew"
            way_out = f"restore plans/{name}.json, or export again"
            verdicts.append(Verdict(name, "plan_error", value, PLAN_TOLERANCE, False, over, way_out))
    return tuple(verdicts), tuple(gaps)


def rebuild_plans(
    folder: Path, manifest: Manifest, recipe: Recipe, steps: int, scheduler: Any
) -> tuple[dict[str, Plan], str]:
    """The plans for that many steps by name; where the cache cannot decide here, those without it, and why."""
    own = read_plan_inputs(folder, manifest)
    content = own.model_copy(update={"scheduler": type(scheduler).__name__, "scheduler_config": scheduler.config})
    cache, problem = recipe.cache, ""
    if getattr(cache, "calibration", None) and (folder / CALIBRATION_FILE).exists():
        cache = cache.model_copy(update={"calibration": CALIBRATION_FILE})
    try:
        asked = recipe.model_copy(update={"cache": cache})
        made, _ = build_plans(folder, manifest, asked, steps, Progress(), content)
    except (ArtifactError, ExportError, RecipeError) as e:
        problem = str(e).partition(";")[0]
        made, _ = build_plans(
            folder, manifest, recipe.model_copy(update={"cache": NoCache()}), steps, Progress(), content
        )
    return add_probes({plan.name: plan for plan in made}, manifest), problem


def plan_error(plan: Plan, fresh: Plan, *, with_cache: bool) -> float:
    """The largest relative difference of two numbers that stand in the same place, later starts included where the cache decided alike;
    inf where one has no place."""
    found, expected = (list_evaluations(p, with_tails=with_cache) for p in (plan, fresh))
    if len(found) != len(expected):
        return math.inf
    rows: list[tuple[Sequence[float], Sequence[float]]] = [((plan.init_noise_sigma,), (fresh.init_noise_sigma,))]
    for ours, theirs in zip(found, expected, strict=True):
        rows += zip(number_rows(ours, with_cache), number_rows(theirs, with_cache), strict=True)
    return max(row_error(*row) for row in rows)


def list_evaluations(plan: Plan, *, with_tails: bool) -> list[Evaluation]:
    """The plan's evaluations, and those that its later starts begin with."""
    return [*plan.evaluations, *(e for tail in plan.tails for e in tail.head if with_tails)]


def number_rows(evaluation: Evaluation, with_cache: bool) -> Iterator[Sequence[float]]:
    """The numbers of one evaluation, those together that are of one kind."""
    update = evaluation.update
    yield (evaluation.timestep,)
    yield (evaluation.input_scale,)
    yield (*update.latents, *update.outputs, update.noise)
    yield (len(update.latents), update.unused_draws)
    yield evaluation.coefficients if with_cache else ()


def row_error(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference in a row."""
    if len(ours) != len(theirs):
        return math.inf
    least = LEAST_NUMBER * max(map(abs, theirs), default=0.0) or LEAST_NUMBER
    return max((abs(a - b) / max(abs(b), least) for a, b in zip(ours, theirs, strict=True)), default=0.0)
