"""SmoothCache against its published rule, written again from the paper, and against reuse by hand in the same modules."""

from __future__ import annotations

import copy
import random
from statistics import fmean

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

from prebake.exporter.caches import NoCache, Trajectory
from prebake.exporter.caches.common.calibration import Calibration
from prebake.exporter.caches.smoothcache import SmoothCache, find_components, scan_errors, schedule
from prebake.exporter.calibrators.observe import average_components, observe_trajectory
from prebake.exporter.plan import make_plans
from prebake.exporter.plan.sampler import SchedulerTable
from prebake.exporter.sites.actions import flat_outputs
from prebake.exporter.sites.component import Component
from prebake.exporter.sites.layout import Layout
from prebake.runtime.errors import ExportError, RecipeError
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.variant_compiler import compiled_run

KINDS = {
    "flux": lambda: denoisers.flux(),
    "pixart": lambda: denoisers.pixart(),
    "sd, guided": lambda: denoisers.with_guidance(denoisers.sd_unet()),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> tuple[Component, Layout]:
    component = KINDS[request.param]()
    return component, layout_of(component)


def table_of(case: int, steps: int) -> SchedulerTable:
    schedulers = (
        DDIMScheduler(clip_sample=False),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        HeunDiscreteScheduler(),
    )
    return peers.table_of(schedulers[case % 3], steps)


def latents_of(component: Component, seed: int) -> Tensor:
    return torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(seed))


def calibration(table: SchedulerTable, errors: dict[str, list[tuple[float, ...]]]) -> Calibration:
    return Calibration(
        model="tiny", sha256="0" * 64, scheduler=table.scheduler, steps=len(set(table.steps)), timesteps=table.timesteps,
        guidance_scale=3.0, prompts=1, prompts_sha256="0" * 64, seeds=1, errors={k: tuple(v) for k, v in errors.items()},
    )  # fmt: skip


def random_errors(rng: random.Random, layout: Layout, count: int, lookahead: int = 3) -> dict[str, list[tuple]]:
    names = (*find_components(layout), *find_components(layout, per_block=True))
    return {n: [tuple(rng.random() for _ in range(min(e, lookahead))) for e in range(count)] for n in names}


def published(errors: list[tuple[float, ...]], alpha: float, lookahead: int) -> list[bool]:
    """Algorithm of the paper, as Roblox/SmoothCache scans it: a row for each distance j, indexed by where a reuse starts."""
    count = len(errors)
    rows = [[errors[i + j][j - 1] for i in range(count - j)] for j in range(1, lookahead + 1)]
    computes: list[bool | None] = [None] * count
    i = 0
    while i < count:
        computes[i] = True
        longest = [j for j, row in enumerate(rows, 1) if i < len(row) and row[i] <= alpha]
        for s in range(1, (longest[-1] if longest else 0) + 1):
            computes[i + s] = False
        i += 1 + (longest[-1] if longest else 0)
    return [c if 0 < e < count - 1 else True for e, c in enumerate(computes)]


def test_the_schedule_is_the_published_one():
    rng = random.Random(0)
    skipped = 0
    for _ in range(400):
        count, lookahead = rng.randint(1, 30), rng.randint(1, 5)
        errors = [tuple(rng.random() for _ in range(min(e, lookahead))) for e in range(count)]
        alpha = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0, *(v for row in errors for v in row[:1])))
        got = scan_errors(SmoothCache(calibration_lookahead=lookahead, calibration_threshold=alpha), errors)
        assert list(got) == published(errors, alpha, lookahead)
        skipped += got.count(False)
    assert skipped > 1000
    assert scan_errors(SmoothCache(calibration_threshold=0.5), [(), (0.5,), (0.6, 0.4), (0.9, 0.9, 0.5)]) == (
        True,
        False,
        False,
        True,
    )


def watched_errors(
    component: Component, layout: Layout, table: SchedulerTable, x: Tensor, lookahead: int
) -> dict[str, list]:
    """relL1 over each distance by the original's arithmetic (norms of order 1), from hooks of our own."""
    outputs: dict[str, list[Tensor]] = {}
    handles = []
    for place in layout.of("attention", "cross_attention", "feed_forward"):

        def keep(module, args, output, site=place.site):
            flat = torch.cat([o.flatten() for o in flat_outputs(output) if isinstance(o, Tensor)])
            outputs.setdefault(site, []).append(flat)

        handles.append(component.module.get_submodule(place.path).register_forward_hook(keep))
    planned = make_plans(NoCache(), layout, {1: table})
    peers.ours(component, planned, planned.plans[0], x)
    for handle in handles:
        handle.remove()
    return {
        site: [
            tuple(
                float(torch.norm(ys[e - j] - ys[e], p=1) / torch.norm(ys[e], p=1))
                for j in range(1, min(e, lookahead) + 1)
            )
            for e in range(len(ys))
        ]
        for site, ys in outputs.items()
    }


def test_calibrated_errors_are_the_originals_averaged_over_the_modules_of_one_name(model):
    component, layout = model
    table, x = table_of(1, 6), latents_of(component, 0)
    seen = observe_trajectory(component, layout, table, peers.inputs_of(component), x, lookahead=3)
    theirs = watched_errors(component, layout, table, x, 3)
    got = average_components(layout, seen.errors)
    assert set(got) == set(theirs) | set(find_components(layout))
    for site, rows in theirs.items():
        for ours, expected in zip(got[site], rows, strict=True):
            assert ours == pytest.approx(expected, rel=1e-4)  # sums of float32 there, of float64 here
    for name, places in find_components(layout).items():
        for e, row in enumerate(got[name]):
            means = [fmean(theirs[p.site][e][j] for p in places) for j in range(min(e, 3))]
            assert row == pytest.approx(means, rel=1e-4)


def by_hand(
    component: Component, layout: Layout, table: SchedulerTable, x: Tensor, computes: dict[str, list[bool]]
) -> peers.Run:
    """Every module's own forward replaced: it runs where its site computes, and else returns what it returned last."""
    module = copy.deepcopy(component.module)
    ran: list[set[str]] = [set() for _ in table.timesteps]
    for place in layout.of("attention", "cross_attention", "feed_forward"):
        if place.site in computes:
            inner = module.get_submodule(place.path)
            inner.forward = reusing(inner.forward, place.site, computes[place.site], ran)
    planned = make_plans(NoCache(), layout, {1: table})
    copied = Component("denoiser", module, component.inputs, ("sample",), component.args, component.branches)
    run = peers.ours(copied, planned, planned.plans[0], x)
    run.ran = ran
    return run


def reusing(forward, site: str, computes: list[bool], ran: list[set[str]]):
    calls, last = iter(range(len(computes))), []

    def called(*args, **kwargs):
        e = next(calls)
        if computes[e]:
            ran[e].add(site)
            last[:] = [forward(*args, **kwargs)]
        return last[0]

    return called


def test_the_plan_reuses_what_hooks_by_hand_reuse(model):
    component, layout = model
    rng = random.Random(1)
    skipped = 0
    for case in range(4):
        table, x = table_of(case, rng.randint(3, 7)), latents_of(component, case)
        count, per_block = len(table.timesteps), case % 2 == 1
        errors = random_errors(rng, layout, count)
        names = list(dict.fromkeys(n.rpartition("/")[2] for n in find_components(layout)))
        cache = SmoothCache(
            calibration_threshold=rng.uniform(0.3, 0.7), per_block=per_block,
            components_to_wrap=rng.choice((None, names[:1])),
        )  # fmt: skip
        planned = make_plans(cache, layout, {1: table}, calibration(table, errors))
        computes = {
            place.site: published(errors[name], cache.calibration_threshold, 3)
            for name, places in find_components(layout, per_block=per_block).items()
            for place in places
            if cache.components_to_wrap is None or place.name.split(".")[-1] in cache.components_to_wrap
        }
        theirs = by_hand(component, layout, table, x, computes)
        got = schedule(cache, layout, Trajectory(table.timesteps), calibration(table, errors))
        assert peers.computed(got) == theirs.ran
        ours = peers.ours(component, planned, planned.plans[0], x)
        assert ours.error(theirs) <= 1e-5  # the same operations in the same order
        plain = by_hand(component, layout, table, x, {})
        assert peers.ours(component, planned, planned.plans[1], x).error(plain) <= 1e-5
        skipped += sum(c.count(False) for c in computes.values())
        if any(False in c for c in computes.values()):
            assert theirs.error(plain) > 1e-4  # a wrong schedule would be seen
    assert skipped > 10


def test_branches_follow_their_own_errors_where_the_original_mixes_them():
    component = denoisers.with_guidance(denoisers.pixart(layers=1))
    layout, table = layout_of(component), table_of(1, 4)
    errors = {
        name: [(), (0.1 if name.startswith("cond/") else 0.9,), (0.9, 0.9), (0.9, 0.9, 0.9)]
        for name in find_components(layout)
    }
    got = schedule(
        SmoothCache(calibration_threshold=0.3), layout, Trajectory(table.timesteps), calibration(table, errors)
    )
    assert {site.partition("/")[0] for site in got.decisions[1].actions} == {"cond"}
    mixed = [tuple(fmean(v) for v in zip(*rows, strict=True)) for rows in zip(*errors.values(), strict=True)]
    assert published(mixed, 0.3, 3) == [True] * 4  # the original's table of both skips nothing


@pytest.mark.slow
@pytest.mark.compiles
def test_compiled_variants_are_the_eager_ones():
    component = denoisers.pixart()
    layout, table, x = layout_of(component), table_of(0, 4), latents_of(component, 2)
    low, high = [(), (0.0,), (0.9, 0.9), (0.9, 0.9, 0.9)], [(), (0.9,), (0.9, 0.9), (0.9, 0.9, 0.9)]
    errors = {name: low if name != "attn2" else high for name in find_components(layout)}
    planned = make_plans(SmoothCache(calibration_threshold=0.1), layout, {4: table}, calibration(table, errors))
    eager = peers.ours(component, planned, planned.plans[0], x)
    # the compiler adds in another order; a wrong site is off by 1e-2
    assert compiled_run("pixart", component, planned, planned.plans[0], x).error(eager) < 2e-5
    assert peers.ours(component, planned, planned.plans[1], x).error(eager) > 1e-4


def test_what_selects_nothing_or_does_not_fit_is_refused():
    layout, table = layout_of(denoisers.pixart()), table_of(1, 5)
    steps = Trajectory(table.timesteps)
    made = calibration(table, random_errors(random.Random(0), layout, 5))
    with pytest.raises(ExportError, match=r"feed-forward .*'mlp'; it has attn1, attn2, ff"):
        schedule(SmoothCache(components_to_wrap=("attn1", "mlp")), layout, steps, made)
    with pytest.raises(ExportError, match=r"'smoothcache' needs .*run `prebake calibrate"):
        schedule(SmoothCache(), layout, steps, None)
    with pytest.raises(ExportError, match=r"'attn1' reach 3 evaluations .*lookahead is 4"):
        schedule(SmoothCache(calibration_lookahead=4), layout, steps, made)
    with pytest.raises(ExportError, match="has no errors, which method 'smoothcache' needs"):
        schedule(SmoothCache(), layout, steps, calibration(table, {}))
    with pytest.raises(RecipeError, match="schedule_length = 50, and this plan has 5 evaluations"):
        schedule(SmoothCache(schedule_length=50), layout, steps, made)
    with pytest.raises(ExportError, match=r"'smoothcache' skips nothing at 5 steps"):
        make_plans(SmoothCache(), layout, {5: table}, made)  # the original's default threshold of 0
