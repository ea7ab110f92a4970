"""First Block Cache against diffusers' hooks: the same decisions and the same trajectory online, and a plan frozen from them."""

from __future__ import annotations

import copy
import inspect
import random

import pytest
import torch
from diffusers import DDIMScheduler, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor, nn

from prebake.exporter.caches import Trajectory
from prebake.exporter.caches.common.calibration import Calibration, DecisionShares, decision_parameters
from prebake.exporter.caches.firstblock import FirstBlockCache, decision, marks, schedule
from prebake.exporter.calibrators import firstblock
from prebake.exporter.calibrators.dynamic_replay import DynamicTrace, dynamic_replay
from prebake.exporter.calibrators.runner import count_decisions
from prebake.exporter.plan import make_plans
from prebake.exporter.plan.sampler import SchedulerTable
from prebake.exporter.sites.component import Component
from prebake.exporter.sites.layout import Layout
from prebake.runtime.errors import ExportError
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.variant_compiler import compiled_run

TABLES = {
    "ddim": lambda n: peers.table_of(DDIMScheduler(clip_sample=False), n),
    "flow": lambda n: peers.table_of(FlowMatchEulerDiscreteScheduler(shift=3.0), n),
    "heun": lambda n: peers.table_of(HeunDiscreteScheduler(), n),
}
# float32, the same operations in the same order; the residual is stored as a difference by both
TOLERANCE = 1e-5


def latents_of(component: Component, seed: int) -> Tensor:
    return torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(seed))


class Sequential(nn.Module):
    """Guidance by two calls of one model, each in its own cache context: how diffusers' pipelines that need it do it."""

    def __init__(self, guided: nn.Module) -> None:
        super().__init__()
        self.one = copy.deepcopy(guided.cond)
        self.inputs, self.doubled = guided.inputs, guided.doubled

    def forward(self, *tensors: Tensor) -> Tensor:
        *own, guidance = tensors
        halves = [
            [t[:, k] if name in self.doubled else t for name, t in zip(self.inputs, own, strict=True)] for k in range(2)
        ]
        outputs = []
        for branch, given in zip(("uncond", "cond"), halves, strict=True):
            self.one.model.branch = branch
            with self.one.model.cache_context(branch):
                outputs.append(self.one(*given))
        uncond, cond = outputs
        return uncond + guidance * (cond - uncond)


def peer(component: Component, layout: Layout, table: SchedulerTable, latents: Tensor, threshold: float) -> peers.Run:
    """The run of diffusers' hooks; `ran` has the blocks, by branch."""
    guided = len(layout.branches) == 2
    if guided:
        inputs, args = component.inputs, component.args
        component = Component("denoiser", Sequential(component.module), inputs, ("sample",), args, {"": "one.model."})
    ran: list[set[str]] = [set() for _ in table.timesteps]

    def apply(model: nn.Module, clock: peers.Clock) -> None:
        for place in layout.blocks(layout.branches[-1]):
            record(model, place.name, clock)
        model.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    def record(model: nn.Module, name: str, clock: peers.Clock) -> None:
        block = model.get_submodule(name)
        forward = block.forward

        def recorded(*args, **kwargs):
            ran[clock.e].add(f"{model.branch}/{name}" if guided else name)
            return forward(*args, **kwargs)

        recorded.__signature__ = inspect.signature(forward)
        block.forward = recorded

    only = None if guided else (lambda model, clock: model.cache_context("only"))
    run = peers.peer_replay(component, table, latents, apply, call=only)
    run.ran = ran
    return run


def ran(layout: Layout, decisions: list[dict[str, bool]]) -> list[set[str]]:
    """The blocks that run under these decisions: always the first, and the others of the branches that compute."""
    return [
        {p.site for b in layout.branches for i, p in enumerate(layout.blocks(b)) if i == 0 or decided[b]}
        for decided in decisions
    ]


def dynamic(
    component: Component, layout: Layout, table: SchedulerTable, latents: Tensor, threshold: float
) -> DynamicTrace:
    cache = FirstBlockCache(threshold=threshold)
    return dynamic_replay(
        component, marks(cache, layout), firstblock.probes(cache, layout), firstblock.OnlineRule(cache, layout, table),
        lambda history: decision(cache, layout, history), table, peers.inputs_of(component), latents,
    )  # fmt: skip


KINDS = {
    "flux": lambda: denoisers.flux(),
    "cogvideox": lambda: denoisers.cogvideox(layers=3),
    "cogvideox, guided": lambda: denoisers.with_guidance(denoisers.cogvideox(layers=3)),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> tuple[Component, Layout]:
    component = KINDS[request.param]()
    return component, layout_of(component)


def threshold_of(layout: Layout) -> float:
    """One at which this model computes at some evaluations and not at others."""
    return 0.6 if any(p.name.startswith("single") for p in layout.places) else 0.3


def close(a: peers.Run | DynamicTrace, b: peers.Run) -> bool:
    """Every evaluation's output and the final latents agree, relative to their largest number."""
    pairs = [*zip(a.outputs, b.outputs, strict=True), (a.latents, b.latents)]
    return all(float((x - y).abs().max()) <= TOLERANCE * float(y.abs().max()) for x, y in pairs)


def test_its_own_rule_decides_and_draws_what_diffusers_does(model):
    component, layout = model
    rng = random.Random(0)
    skipped = kept = 0
    for case in range(8):
        table = TABLES[("ddim", "flow", "heun")[case % 3]](rng.randint(2, 9))
        threshold = rng.choice((0.02, 0.2, 0.3, 0.5, 0.7, 1.0))
        x = latents_of(component, case)
        theirs = peer(component, layout, table, x, threshold)
        got = dynamic(component, layout, table, x, threshold)
        assert ran(layout, got.decisions) == theirs.ran
        assert close(got, theirs)
        computed = [d[b] for d in got.decisions for b in layout.branches]
        skipped, kept = skipped + computed.count(False), kept + computed.count(True)
    assert min(skipped, kept) > 10  # the cases tried both


def test_the_comparison_can_fail(model):
    component, layout = model
    table, x = TABLES["flow"](8), latents_of(component, 0)
    theirs = peer(component, layout, table, x, 0.5)
    other = dynamic(component, layout, table, x, 0.05)
    assert ran(layout, other.decisions) != theirs.ran
    assert not close(other, theirs)


def calibration(
    layout: Layout, table: SchedulerTable, cache: FirstBlockCache, runs: list[list[dict[str, bool]]]
) -> Calibration:
    return Calibration(
        model="tiny", sha256="0" * 64, scheduler=table.scheduler, steps=len(set(table.steps)), timesteps=table.timesteps,
        guidance_scale=3.0, prompts=len(runs), prompts_sha256="0" * 64, seeds=1,
        decisions={"firstblock": count_decisions(cache, runs)},
    )  # fmt: skip


def test_the_plan_of_one_run_is_that_run(model):
    component, layout = model
    table, x, cache = TABLES["ddim"](7), latents_of(component, 3), FirstBlockCache(threshold=threshold_of(layout))
    theirs = peer(component, layout, table, x, cache.threshold)
    made = calibration(layout, table, cache, [dynamic(component, layout, table, x, cache.threshold).decisions])
    planned = make_plans(cache, layout, {7: table}, made)
    assert close(peers.ours(component, planned, planned.plans[0], x), theirs)
    plain = peers.peer_replay(component, table, x, lambda model, clock: None)
    assert close(peers.ours(component, planned, planned.plans[1], x), plain)
    assert not close(theirs, plain)


def test_the_plan_of_many_runs_is_the_majority_of_diffusers_own(model):
    component, layout = model
    table, count = TABLES["ddim"](8), 5
    cache = FirstBlockCache(threshold=threshold_of(layout))
    xs = [latents_of(component, seed) for seed in range(count)]
    theirs = [peer(component, layout, table, x, cache.threshold).ran for x in xs]
    made = calibration(
        layout, table, cache, [dynamic(component, layout, table, x, cache.threshold).decisions for x in xs]
    )
    seconds = {b: layout.blocks(b)[1].site for b in layout.branches}  # a block that runs where the branch computes
    for quorum in (0.2, 0.5, 0.8, 1.0):
        chosen = cache.model_copy(update={"quorum": quorum})
        got = schedule(chosen, layout, Trajectory(table.timesteps), made)
        for e, d in enumerate(got.decisions):
            for mark, (_, site) in zip(got.marks, seconds.items(), strict=True):
                votes = sum(site in sites[e] for sites in theirs)
                assert (mark.name not in d.actions) == (votes >= quorum * count)


def moved(component: Component, layout: Layout, table: SchedulerTable, x: Tensor) -> dict[str, float]:
    """By how much each branch's first residual moves from evaluation 0 to 1, as a share of its size."""
    seen: dict[str, list[Tensor]] = {b: [] for b in layout.branches}

    class Recording(firstblock.OnlineRule):
        def computes(self, branch: str, residual: Tensor) -> bool:
            seen[branch].append(residual)
            return super().computes(branch, residual)

    cache = FirstBlockCache()
    dynamic_replay(
        component, marks(cache, layout), firstblock.probes(cache, layout), Recording(cache, layout, table),
        lambda history: decision(cache, layout, history), table, peers.inputs_of(component), x,
    )  # fmt: skip
    return {b: float((r[1] - r[0]).abs().mean() / r[0].abs().mean()) for b, r in seen.items()}


def test_branches_decide_apart_where_a_batch_in_diffusers_decides_for_both():
    component = KINDS["cogvideox, guided"]()
    layout, table, x = layout_of(component), TABLES["flow"](2), latents_of(component, 0)
    shares_moved = moved(component, layout, table, x)
    threshold = sum(shares_moved.values()) / 2
    got = dynamic(component, layout, table, x, threshold)
    assert got.decisions[1] == {b: share > threshold for b, share in shares_moved.items()}
    assert sorted(got.decisions[1].values()) == [False, True]
    apart = peer(component, layout, table, x, threshold)  # two contexts, as diffusers' sequential guidance
    assert ran(layout, got.decisions) == apart.ran
    assert close(got, apart)
    together = peers.peer_replay(
        component, table, x, lambda model, clock: model.enable_cache(FirstBlockCacheConfig(threshold=threshold)),
        call=lambda model, clock: model.cache_context("both"),
    )  # fmt: skip
    blocks = {p.name for p in layout.blocks("cond")}
    assert len(together.ran[1] & blocks) in (1, len(blocks))  # one decision over the batch of two
    assert not close(got, together)


@pytest.mark.slow  # `test_cache_compilation.py` compiles the same kind of variants at every run
@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["flux", "cogvideox, guided"])
def test_compiled_variants_are_the_eager_ones(kind):
    component = KINDS[kind]()
    layout, table, cache = layout_of(component), TABLES["flow"](5), FirstBlockCache()
    runs = [[dict.fromkeys(layout.branches, e % 2 == 0) for e in range(5)]]
    planned = make_plans(cache, layout, {5: table}, calibration(layout, table, cache, runs))
    x = latents_of(component, 1)
    eager = peers.ours(component, planned, planned.plans[0], x)
    # the compiler adds in another order; a wrong site is off by 1e-2
    assert compiled_run(kind, component, planned, planned.plans[0], x).error(eager) < 2e-5
    assert peers.ours(component, planned, planned.plans[1], x).error(eager) > 1e-4


def refused(match: str, cache: FirstBlockCache, table: SchedulerTable, made: Calibration | None) -> None:
    with pytest.raises(ExportError, match=match):
        schedule(cache, layout_of(denoisers.flux()), Trajectory(table.timesteps), made)


def test_what_does_not_fit_the_calibration_is_refused_with_the_command_to_run():
    layout, table, cache = layout_of(denoisers.flux()), TABLES["flow"](4), FirstBlockCache()
    made = calibration(layout, table, cache, [[{"": True}] * 4])
    refused(
        "'firstblock' needs a calibration of the model .*; run `prebake calibrate --recipe RECIPE", cache, table, None
    )
    refused(r"made for 4 steps \(4 evaluations\), and the plan has 6", cache, TABLES["flow"](6), made)
    refused(
        "made with FlowMatchEuler.* at timestep 1000 of evaluation 0, where the plan has 750",
        cache,
        TABLES["ddim"](4),
        made,
    )
    other = cache.model_copy(update={"threshold": 0.1})
    refused(r"made with other parameters \(threshold is 0.05 there and 0.1 here\)", other, table, made)
    lacking = made.model_copy(update={"decisions": {"dbcache": made.decisions["firstblock"]}})
    refused("has decisions of dbcache and none of 'firstblock'", cache, table, lacking)
    foreign = DecisionShares(parameters=decision_parameters(cache), computed={"cond": (1.0,) * 4})
    refused(
        "has decisions for 'cond', and the model has ''",
        cache,
        table,
        made.model_copy(update={"decisions": {"firstblock": foreign}}),
    )


def test_a_model_of_one_block_is_refused():
    layout = layout_of(denoisers.cogvideox(layers=1))
    with pytest.raises(ExportError, match="all transformer blocks but the first, and the model has 1"):
        marks(FirstBlockCache(), layout)
