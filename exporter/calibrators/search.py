"""Search: the plans that come nearest to the final picture, one for each cost, with the weights of what they predict.

In: a denoiser, some trajectories to fit on and others to judge by. Out: `FittedPlan` plans, cheapest first, each better than
all cheaper ones on prompts that it was not fitted on.

All candidate plans walk together, evaluation by evaluation: a beam for each cost so far and each time since the last
computed evaluation. A candidate computes, or skips by predicting, which is a weighted sum of values that it stored. The
weights are a least-squares fit over all prompts at once. For the denoiser's own output the fit's aim is not the value that
was skipped but the *uncached trajectory*: the output that would lead from these latents, as they have come to be, to the
next latents of the run that computes everything. So a prediction also takes back what earlier ones got wrong, and the
weights become those of a multistep solver made for this model and this schedule. Candidates carry their real latents and
stored values, so nothing is assumed about how errors add up (LeMiCa, arXiv:2511.00090, adds them along a path). At the end
the best plan of each cost is improved by exchanging a computed evaluation with its neighbour, as long as that helps.

The weights are as many as there are slots, and the equations as many as there are latent numbers: a dozen prompts fit.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...runtime.errors import ExportError
from ...runtime.plan import Update
from ...runtime.replay import DenoiserVariant, Tensors, apply_update, scale_tensor
from ..caches.auto import Auto, skip_actions, skip_marks
from ..caches.common.calibration import FittedPlan
from ..cost.count import module_flops
from ..plan import PlanSet
from ..plan.sampler import SchedulerTable
from ..progress import Progress
from ..sites.component import Component
from ..sites.layout import Layout
from ..sites.marks import Mark
from ..sites.marks import Variant as Actions
from ..verify.closeness import psnr_db
from .eager_replay import eager_variants

if TYPE_CHECKING:
    from .subject import CalibrationRun, CalibrationSubject

RIDGE = 0.01  # stored values are trusted to 1 %, so that weights stay small: int8's and bfloat16's rounding pass through them
MAX_AGE = 4
OUTPUT_SITE = "output"  # the skip, and its site
SiteWeights = Mapping[str, tuple[float, ...]]
PathStep = tuple[
    str, SiteWeights
]  # what an evaluation skips ("" where it computes), and the weights of what it predicts


@dataclass(frozen=True)
class Examples:
    """Trajectories side by side, P of them: the denoiser's constant inputs, first latents and noise, [P, ...] each, and the
    latents [P, ...] before every evaluation of the uncached run and after its last."""

    inputs: Mapping[str, Tensor]
    latents: Tensor
    noise: tuple[Tensor, ...]
    uncached: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class BeamState:
    """A candidate on its way: its latents and stored values after `len(path)` evaluations, and what they cost so far."""

    latents: Tensor
    starts: tuple[Tensor, ...]  # newest first, as an Update reads them
    outputs: tuple[Tensor, ...]
    stored: Mapping[str, tuple[Tensor, ...]]  # tensor of a site -> values, newest first
    path: tuple[PathStep, ...] = ()
    cost: float = 0.0


@dataclass(frozen=True)
class SkipCandidate:
    """A candidate: the sites that it predicts, and what it still costs, as a share of computing."""

    name: str
    marks: tuple[Mark, ...]
    share: float


class SearchWalk:
    """The denoiser as the search drives it: a variant for computing and one for each skip, and the sampler's updates."""

    def __init__(
        self, denoiser: Component, layout: Layout, table: SchedulerTable, cache: Auto, timestep_scale: float
    ) -> None:
        self.table, self.slots, self.timestep_scale = table, cache.slots, timestep_scale
        self.skips = list_skips(denoiser, layout, cache)
        marks = tuple({m.name: m for skip in self.skips for m in skip.marks}.values())
        variants = [
            Actions("full", ()),
            *(Actions(s.name, tuple(skip_actions(marks, s.marks).items())) for s in self.skips),
        ]
        self.tensors = {m.name: m.tensors for m in marks}
        self.variants = eager_variants(denoiser, PlanSet(marks, tuple(variants), ()))
        self.history = max(len(part) for u in table.updates for part in (u.latents, u.outputs))

    def start(self, examples: Examples) -> BeamState:
        return BeamState(examples.latents, (), (), {})

    def evaluate_step(self, state: BeamState, examples: Examples, step: PathStep) -> BeamState:
        """The state after one more evaluation, which computes or takes this step's predictions."""
        skip, weights = step
        call = self.call(state, examples)
        if not skip:
            result = self.variants["full"].call(call)
            fresh = {t: result[t] for tensors in self.tensors.values() for t in tensors}
            stored = {t: (v, *state.stored.get(t, ())[: self.slots - 1]) for t, v in fresh.items()}
            return self.apply_output(replace(state, stored=stored), examples, result["sample"], step, 1.0)
        share = next(s.share for s in self.skips if s.name == skip)
        if skip == OUTPUT_SITE:  # in eager the variant would run the whole model and throw its output away
            return self.apply_output(
                state, examples, weighted_sum(weights[OUTPUT_SITE], state.stored["output:0"]), step, share
            )
        variant = self.variants[skip]
        result = variant.call({**call, **self.predictions(variant, state, weights)})
        return self.apply_output(state, examples, result["sample"], step, share)

    def call(self, state: BeamState, examples: Examples) -> Tensors:
        e = len(state.path)
        timestep = torch.full((len(state.latents),), self.table.timesteps[e] * self.timestep_scale)
        latents = scale_tensor(state.latents, self.table.input_scales[e])
        return {**examples.inputs, "hidden_states": latents, "timestep": timestep}

    def predictions(self, variant: DenoiserVariant, state: BeamState, weights: SiteWeights) -> Tensors:
        """The inputs that a skipping variant has besides the denoiser's own: weights, and the values that they weigh."""
        sites = variant.graph.combines
        values = {
            f"{tensor}@{k}": fill_slots(state.stored[tensor], self.slots)[k]
            for site in sites
            for tensor in self.tensors[site]
            for k in range(self.slots)
        }
        return {"coefficients": torch.tensor([[w for site in sites for w in weights[site]]]), **values}

    def apply_output(
        self, state: BeamState, examples: Examples, output: Tensor, step: PathStep, share: float
    ) -> BeamState:
        e = len(state.path)
        starts = (state.latents, *state.starts)[: self.history]
        outputs = (output, *state.outputs)[: self.history]
        latents = apply_update(
            self.table.updates[e], starts, outputs, iter(select_noise(self.table.updates, examples.noise, e))
        )
        return replace(
            state, latents=latents, starts=starts, outputs=outputs, path=(*state.path, step), cost=state.cost + share
        )

    def computed(self, examples: Examples) -> Examples:
        """The examples with their uncached trajectories."""
        states = [self.start(examples)]
        for _ in self.table.updates:
            states.append(self.evaluate_step(states[-1], examples, ("", {})))
        return replace(examples, uncached=tuple(s.latents for s in states))

    def follow_path(self, examples: Examples, path: Iterable[PathStep]) -> Tensor:
        """The final latents [P, ...] of a plan."""
        state = self.start(examples)
        for step in path:
            state = self.evaluate_step(state, examples, step)
        return state.latents

    def target_output(self, state: BeamState, examples: Examples) -> Tensor | None:
        """The output [P, ...] that leads from the state's latents to the uncached run's next; None where none can."""
        e = len(state.path)
        update = self.table.updates[e]
        if not update.outputs[0]:
            return None
        nothing = torch.zeros_like(state.latents)
        starts, outputs = (state.latents, *state.starts), (nothing, *state.outputs)
        rest = apply_update(update, starts, outputs, iter(select_noise(self.table.updates, examples.noise, e)))
        return (examples.uncached[e + 1] - rest) / update.outputs[0]

    def fit_weights(
        self, state: BeamState, computed: BeamState, examples: Examples, skip: SkipCandidate
    ) -> SiteWeights | None:
        """The weights of this skip's sites; `computed` is the state after computing. None where nothing can be fitted."""
        weights = {}
        for mark in skip.marks:
            if mark.name == OUTPUT_SITE:
                aim = self.target_output(state, examples)
                aims = None if aim is None else [aim]
            else:
                aims = [computed.stored[t][0] for t in mark.tensors]
            if aims is None:
                return None
            weights[mark.name] = least_squares(aims, [state.stored[t] for t in mark.tensors], self.slots)
        return weights


def list_skips(denoiser: Component, layout: Layout, cache: Auto) -> tuple[SkipCandidate, ...]:
    """The recipe's candidates on this model, with what is left to compute of each by FLOPs."""
    inside = module_flops(denoiser.module, denoiser.args)
    total = max(inside.values())
    found = []
    for name in dict.fromkeys(cache.candidates):
        marks = skip_marks(name, layout, cache.slots)
        paths = {path for m in marks for path in m.modules}
        left = 0.0 if name == OUTPUT_SITE else 1 - sum(inside.get(path, 0) for path in paths) / total
        found.append(SkipCandidate(name, marks, left))
    return tuple(found)


def least_squares(aims: Sequence[Tensor], values: Sequence[Sequence[Tensor]], slots: int) -> tuple[float, ...]:
    """The weights w that minimise |aim - sum w_k value_k|^2, over all tensors of a site together, newest value first.

    `RIDGE` is the relative noise that each value is assumed to have. Slots that hold nothing yet get the weight 0.
    """
    count = len(values[0])
    columns = torch.stack([torch.cat([v[k].flatten() for v in values]).double() for k in range(count)], 1)
    normal = columns.T @ columns
    normal += RIDGE**2 * torch.diag(normal.diagonal())
    right = columns.T @ torch.cat([a.flatten() for a in aims]).double()
    solution = torch.linalg.lstsq(normal, right[:, None]).solution[:, 0]
    return (*solution.tolist(), *([0.0] * (slots - count)))


def search_plans(
    subject: CalibrationSubject,
    cache: Auto,
    fit: Sequence[CalibrationRun],
    judge: Sequence[CalibrationRun],
    decode: Callable[[Tensor], Tensor],
    plain: Callable[[int], SchedulerTable],
    progress: Progress,
) -> tuple[FittedPlan, ...]:
    """The best plan for each cost up to the cache's `search_budget`, cheapest first.

    `decode` makes pictures [P, 3, H, W] in 0..1 of latents, `plain(n)` is the table of n steps, and `judge` holds the runs
    that nothing is fitted on. Raises ExportError where no plan was found.
    """
    with torch.no_grad():
        walk = SearchWalk(subject.denoiser, subject.layout, subject.table, cache, subject.timestep_scale)
        with progress.stage("search", len(subject.table.updates)):
            examples = walk.computed(stack_runs(fit))
            finals = walk_beam(walk, examples, cache, progress)
            truth = decode(examples.uncached[-1])
            best = choose_finalists(finals, decode, truth)
        with progress.stage("refine", len(best)):
            for i, (_, state) in enumerate(best):
                progress.announce(f"{state.cost:.1f} of {len(state.path)} evaluations")
                better = refine_state(walk, state, examples)
                best[i] = (mean_psnr_db(decode(better.latents), truth), better)
        with progress.stage("judge", len(best)):
            return judge_plans(walk, subject, best, judge, decode, plain, progress)


def walk_beam(walk: SearchWalk, examples: Examples, cache: Auto, progress: Progress) -> list[BeamState]:
    """The beam's states after the last evaluation."""
    count = len(walk.table.updates)
    most = cache.search_budget * count + 1e-9
    beam = [walk.start(examples)]
    for e in range(count):
        following = []
        for state in beam:
            following += expand_state(walk, state, examples, cache, most)
        beam = prune_beam(following, examples.uncached[e + 1], cache.beam)
        progress.announce(f"evaluation {e + 1} of {count}: {len(beam)} candidates")
    if not beam:
        raise ExportError(
            f"cache.search_budget {cache.search_budget:g}: no plan of {count} evaluations costs so little; raise it, take more "
            "steps, or set cache.method=none"
        )
    return beam


def expand_state(walk: SearchWalk, state: BeamState, examples: Examples, cache: Auto, most: float) -> list[BeamState]:
    """The states that may follow one within the cost `most`: computing, and each skip with its fitted weights."""
    needs_values = any(m.name != OUTPUT_SITE for s in walk.skips for m in s.marks) and bool(state.stored)
    affordable = state.cost + 1 <= most
    computed = walk.evaluate_step(state, examples, ("", {})) if affordable or needs_values else state
    following = [computed] if affordable else []
    used = {skip for skip, _ in state.path if skip}
    for skip in walk.skips if state.stored else ():
        within = len(used | {skip.name}) < cache.max_variants and state.cost + skip.share <= most
        weights = walk.fit_weights(state, computed, examples, skip) if within else None
        if weights is not None:
            following.append(walk.evaluate_step(state, examples, (skip.name, weights)))
    return following


def prune_beam(states: Iterable[BeamState], uncached: Tensor, beam: int) -> list[BeamState]:
    """The `beam` states nearest to the uncached run's latents in each group of equal cost and freshness.

    Nearest now is not best in the end: of two plans that have cost the same, the one that computed last is nearer, and
    the one that has yet to compute may have chosen the better place. So states are compared with those that computed as
    long ago, up to `MAX_AGE` evaluations.
    """
    groups: dict[tuple[int, int], list[tuple[float, BeamState]]] = {}
    for s in states:
        age = next((k for k, (skip, _) in enumerate(reversed(s.path)) if not skip), 0)
        distance = float((s.latents - uncached).double().pow(2).mean())
        groups.setdefault((round(2 * s.cost), min(age, MAX_AGE)), []).append((distance, s))
    return [s for _, group in sorted(groups.items()) for _, s in sorted(group, key=lambda pair: pair[0])[:beam]]


def choose_finalists(
    finals: Sequence[BeamState], decode: Callable[[Tensor], Tensor], truth: Tensor
) -> list[tuple[float, BeamState]]:
    """The state of each cost whose pictures are nearest to `truth`, with their PSNR, cheapest first."""
    best: dict[int, tuple[float, BeamState]] = {}
    for state in finals:
        found = (mean_psnr_db(decode(state.latents), truth), state)
        best[round(2 * state.cost)] = max(best.get(round(2 * state.cost), found), found, key=lambda pair: pair[0])
    return [best[cost] for cost in sorted(best)]


def refine_state(walk: SearchWalk, state: BeamState, examples: Examples) -> BeamState:
    """The state after as many exchanges of a computed evaluation with its skipped neighbour as bring it nearer to the end of
    the uncached run, the best exchange each time, with the weights of all later predictions fitted again."""

    def distance(s: BeamState) -> float:
        return float((s.latents - examples.uncached[-1]).double().pow(2).mean())

    while True:
        trail = [walk.start(examples)]
        for step in state.path:
            trail.append(walk.evaluate_step(trail[-1], examples, step))
        skips = [skip for skip, _ in state.path]
        places = [e for e in range(1, len(skips) - 1) if (skips[e] == "") != (skips[e + 1] == "")]
        tried = [resume_path(walk, trail[e], examples, [skips[e + 1], skips[e], *skips[e + 2 :]]) for e in places]
        best = min((s for s in tried if s), key=distance, default=state)
        if distance(best) >= distance(state):
            return state
        state = best


def resume_path(walk: SearchWalk, state: BeamState, examples: Examples, skips: Sequence[str]) -> BeamState | None:
    """The state after evaluations that compute ("") or skip as named, with fitted weights; None where none can be."""
    by_name = {skip.name: skip for skip in walk.skips}
    for name in skips:
        weights: SiteWeights | None = {}
        if name:
            computed = state if name == OUTPUT_SITE else walk.evaluate_step(state, examples, ("", {}))
            weights = walk.fit_weights(state, computed, examples, by_name[name])
        if weights is None:
            return None
        state = walk.evaluate_step(state, examples, (name, weights))
    return state


def judge_plans(
    walk: SearchWalk,
    subject: CalibrationSubject,
    best: Sequence[tuple[float, BeamState]],
    judge: Sequence[CalibrationRun],
    decode: Callable[[Tensor], Tensor],
    plain: Callable[[int], SchedulerTable],
    progress: Progress,
) -> tuple[FittedPlan, ...]:
    """The plans as `FittedPlan`, measured on the runs to judge by; one that a cheaper one beats there is left out."""
    count = len(walk.table.updates)
    examples = walk.computed(stack_runs(judge))
    truth = decode(examples.uncached[-1])
    fewer: dict[int, float] = {}
    plans: list[FittedPlan] = []
    for fit_psnr_db, state in best:
        progress.announce(f"{state.cost:.1f} of {count} evaluations")
        steps = max(1, int(state.cost + 1e-9))
        if steps not in fewer:
            table = plain(steps)
            shorter = SearchWalk(
                subject.denoiser, subject.layout, table, Auto(candidates=("output",)), subject.timestep_scale
            )
            again = restart_examples(examples, table, walk.table.init_noise_sigma)
            fewer[steps] = mean_psnr_db(decode(shorter.computed(again).uncached[-1]), truth)
        held_out = mean_psnr_db(decode(walk.follow_path(examples, state.path)), truth)
        if all(p.held_out_psnr_db < held_out for p in plans):
            plans.append(
                FittedPlan(
                    cost=state.cost / count,
                    skips=tuple(skip for skip, _ in state.path),
                    weights=tuple(dict(weights) for _, weights in state.path),
                    psnr_db=fit_psnr_db,
                    held_out_psnr_db=held_out,
                    fewer_steps=steps,
                    fewer_steps_psnr_db=fewer[steps],
                )
            )
    return tuple(plans)


def stack_runs(runs: Sequence[CalibrationRun]) -> Examples:
    """Runs of one prompt each as one batch."""
    inputs = {name: torch.cat([run.inputs[name] for run in runs]) for name in runs[0].inputs}
    noise = tuple(torch.cat(draws) for draws in zip(*(run.noise for run in runs), strict=True))
    return Examples(inputs, torch.cat([run.latents for run in runs]), noise)


def restart_examples(examples: Examples, table: SchedulerTable, init_noise_sigma: float) -> Examples:
    """The examples started for another table, whose noise, if it takes any, is drawn anew."""
    latents = examples.latents * (table.init_noise_sigma / init_noise_sigma)
    generator = torch.Generator().manual_seed(0)
    noise = tuple(torch.randn(latents.shape, generator=generator) for u in table.updates if u.noise)
    return Examples(examples.inputs, latents, noise)


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The sum of values times weights, in float32; what there are more weights than values for is left out."""
    first, *rest = (w * v.float() for w, v in zip(weights, values, strict=False))
    return sum(rest, first)


def fill_slots(values: Sequence[Tensor], slots: int) -> tuple[Tensor, ...]:
    """All slots; those that hold nothing yet repeat the oldest value, whose weight there is 0."""
    return (*values, *([values[-1]] * (slots - len(values))))


def select_noise(updates: Sequence[Update], noise: Sequence[Tensor], e: int) -> Sequence[Tensor]:
    """The noise of evaluation e, if its update takes any."""
    taken = sum(u.noise != 0 for u in updates[:e])
    return noise[taken : taken + 1] if updates[e].noise else ()


def mean_psnr_db(pictures: Tensor, truth: Tensor) -> float:
    """Mean over [P, 3, H, W] in 0..1 of each picture's PSNR."""
    return statistics.fmean(map(psnr_db, pictures, truth))
