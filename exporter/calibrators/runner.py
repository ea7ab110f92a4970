"""Calibrate: a recipe, a model and some prompts come in, eager runs are watched, a `Calibration` comes out.

The model is the plain one: no rewrite, no compilation, so that the numbers describe the model and not one export of it.
Prompt i of P is drawn with the seeds i, i + P, i + 2 P and so on: as the prompt sets of `shapes` count them, and no two
runs share their noise.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import RecipeError
from .. import shapes
from ..caches import find_policy
from ..caches.auto import Auto, skip_marks
from ..caches.common.calibration import Calibration, DecisionShares, FittedPlan, FrozenCache, decision_parameters
from ..caches.smoothcache import SmoothCache
from ..families.picture import Size
from ..families.registry import Family, find_family
from ..load import source
from ..plan.sampler import SchedulerTable
from ..progress import Progress
from ..recipe.resolve import Recipe
from ..recipe.schema import GUIDANCE, Guidance
from ..settle import load_pipeline, sampler_table, settle
from ..sites.discover import discover_layout
from ..sites.layout import Layout
from .dynamic_replay import DynamicTrace, dynamic_replay
from .observe import SiteFigures, average_components, mean_rows, observe_trajectory
from .search import search_plans
from .subject import CalibrationRun, CalibrationSubject

MIN_LOOKAHEAD = 3  # evaluations that SmoothCache's errors reach back at least


def choose_prompts(model: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The given prompts, or the set that an embedded model brings. Raises RecipeError where there is neither."""
    if given:
        return tuple(given)
    if model in source.EMBEDDED_MODELS:
        return tuple(shapes.read_prompt_set("underspecified"))
    raise RecipeError(f"model {model!r} brings no prompts; give some with --prompts FILE, one a line")


def calibrate(
    recipe: Recipe,
    prompts: Sequence[str],
    seeds: int,
    progress: Progress,
    *,
    steps: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """The calibration from `seeds` runs of every prompt, at `steps` steps or the recipe's first number of them.

    Raises ExportError, before the first run, where the recipe's cache names what the model does not have.
    """
    with progress.stage("load"):
        progress.announce(recipe.model.id)
        loaded = load_pipeline(recipe, {"default": dtype})
        pipe, family = loaded.pipe, find_family(loaded.pipe)
        defaults, size, usual = settle(recipe, family, loaded)
        table = sampler_table(family, pipe, size, steps or usual[0], progress)
        denoiser = family.denoiser(pipe, size, recipe.guidance)
        scale = family.facts(pipe, size)["timestep_scale"]
        subject = CalibrationSubject(denoiser, discover_layout(denoiser), table, scale)
        check_cache(subject, recipe.cache)
    with progress.stage("runs", len(prompts) * seeds):
        runs = list(
            draw_runs(family, pipe, size, table, prompts, seeds, defaults.guidance_scale, guidance=recipe.guidance)
        )
        halves = split_runs(runs, seeds, recipe.cache) if isinstance(recipe.cache, Auto) else None
        observed, decided = observe_runs(subject, recipe.cache, iter(runs), progress)
    plans: tuple[FittedPlan, ...] = ()
    if isinstance(recipe.cache, Auto) and halves:

        def plain(n: int) -> SchedulerTable:
            return sampler_table(family, pipe, size, n, progress)

        plans = search_plans(subject, recipe.cache, *halves, build_decoder(family, pipe, size), plain, progress)
    return Calibration(
        model=loaded.source.model,
        sha256=loaded.source.sha256,
        scheduler=table.scheduler,
        steps=steps or usual[0],
        timesteps=table.timesteps,
        height=size.height,
        width=size.width,
        guidance_scale=defaults.guidance_scale,
        prompts=len(prompts),
        prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        seeds=seeds,
        decisions={recipe.cache.method: count_decisions(recipe.cache, decided)} if decided else {},
        auto=plans,
        **average_figures(subject.layout, observed),
    )


def check_cache(subject: CalibrationSubject, cache: Any) -> None:
    """Raises ExportError where the cache asks for sites that the model lacks."""
    if isinstance(cache, Auto):
        for candidate in cache.candidates:
            skip_marks(candidate, subject.layout, cache.slots)
    elif decides := find_rule_modules(cache):
        policy, rule = decides
        policy.marks(cache, subject.layout)
        rule.OnlineRule(cache, subject.layout, subject.table)


def split_runs(
    runs: Sequence[CalibrationRun], seeds: int, cache: Auto
) -> tuple[Sequence[CalibrationRun], Sequence[CalibrationRun]]:
    """The runs to fit plans on, of every third prompt, and those of the other prompts to judge them by.

    Raises RecipeError where there are no others.
    """
    by_prompt = [runs[i : i + seeds] for i in range(0, len(runs), seeds)]
    fit = [run for group in by_prompt[::3] for run in group]
    judge = [run for i, group in enumerate(by_prompt) if i % 3 for run in group]
    if not judge:
        raise RecipeError(
            f"cache.method 'auto' is fitted on some prompts and judged by others, and there is {len(by_prompt)}; give more"
        )
    return fit[: cache.fit_runs], judge[: cache.judge_runs]


def build_decoder(family: Family, pipe: Any, size: Size) -> Callable[[Tensor], Tensor]:
    """Latents [P, ...] to pictures [P, 3, H, W] in 0..1, or videos [P, T, 3, H, W], one after the other."""
    module = family.other_components(pipe, size, channels_last=False)[-1].module
    return lambda latents: torch.cat([module(one)[0] for one in latents.split(1)])


def draw_runs(
    family: Family,
    pipe: Any,
    size: Size,
    table: SchedulerTable,
    prompts: Sequence[str],
    seeds: int,
    guidance_scale: float,
    first_seed: int = 0,
    guidance: Guidance = GUIDANCE,
) -> Iterator[CalibrationRun]:
    """Every prompt with each of its seeds: the noise that diffusers draws from them, latents first."""
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            inputs = family.encode(pipe, size, prompt, guidance_scale, guidance)
        for seed in range(first_seed + i, first_seed + i + len(prompts) * seeds, len(prompts)):
            generator = torch.Generator().manual_seed(seed)
            latents = family.noise(pipe, size, generator) * table.init_noise_sigma
            updates = [u for u in table.updates if u.noise]
            draws = [
                [torch.randn(latents.shape, generator=generator) for _ in range(u.unused_draws + 1)] for u in updates
            ]
            noise = tuple(drawn[-1] for drawn in draws)
            yield CalibrationRun(f"{prompt!r}, seed {seed}", inputs, latents, noise)


def observe_runs(
    subject: CalibrationSubject, cache: Any, runs: Iterator[CalibrationRun], progress: Progress
) -> tuple[list[SiteFigures], list[list[dict[str, bool]]]]:
    """Each run's figures, and what the recipe's method decides in it if it decides as it goes."""
    lookahead = max(MIN_LOOKAHEAD, cache.calibration_lookahead if isinstance(cache, SmoothCache) else 0)
    decides = build_rule_replay(cache)
    observed, decided = [], []
    for run in runs:
        progress.announce(run.label)
        observed.append(
            observe_trajectory(
                subject.denoiser,
                subject.layout,
                subject.table,
                run.inputs,
                run.latents,
                lookahead=lookahead,
                timestep_scale=subject.timestep_scale,
                noise=run.noise,
            )
        )
        if decides:
            decided.append(decides(subject, run).decisions)
    return observed, decided


def find_rule_modules(cache: Any) -> tuple[Any, Any] | None:
    """The policy of a data-dependent method and its own rule, two modules, or None for one that does not look at data."""
    if not isinstance(cache, FrozenCache) or cache.exact:
        return None
    return find_policy(cache), importlib.import_module(f"..{cache.method}", __name__)


def build_rule_replay(cache: Any) -> Callable[[CalibrationSubject, CalibrationRun], DynamicTrace] | None:
    """The replay of a data-dependent method by its own rule, or None for a method that does not look at the data."""
    decides = find_rule_modules(cache)
    if decides is None:
        return None
    policy, rule = decides

    def replayed(subject: CalibrationSubject, run: CalibrationRun) -> DynamicTrace:
        layout = subject.layout
        return dynamic_replay(
            subject.denoiser,
            policy.marks(cache, layout),
            rule.probes(cache, layout),
            rule.OnlineRule(cache, layout, subject.table),
            lambda history: policy.decision(cache, layout, history),
            subject.table,
            run.inputs,
            run.latents,
            timestep_scale=subject.timestep_scale,
            noise=run.noise,
        )

    return replayed


def count_decisions(cache: Any, runs: Sequence[Sequence[Mapping[str, bool]]]) -> DecisionShares:
    """The share of runs that computed, for each key and evaluation."""
    computed = {
        key: tuple(fmean(decisions[e][key] for decisions in runs) for e in range(len(runs[0]))) for key in runs[0][0]
    }
    return DecisionShares(parameters=decision_parameters(cache), computed=computed)


def average_figures(layout: Layout, observed: Sequence[SiteFigures]) -> dict[str, Any]:
    """`changes`, `magnitudes` and `errors` of a `Calibration`: means over the runs."""
    first = observed[0]
    changes = {
        site: tuple(map(mean_or_none, zip(*(o.changes[site] for o in observed), strict=True))) for site in first.changes
    }
    magnitudes = {
        branch: tuple(map(fmean, zip(*(o.magnitudes[branch] for o in observed), strict=True)))
        for branch in first.magnitudes
    }
    errors = average_components(layout, {site: mean_rows([o.errors[site] for o in observed]) for site in first.errors})
    return {"changes": changes, "magnitudes": magnitudes, "errors": {k: tuple(rows) for k, rows in errors.items()}}


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean, None where the first evaluation has nothing before it."""
    known = [v for v in values if v is not None]
    return fmean(known) if known else None
