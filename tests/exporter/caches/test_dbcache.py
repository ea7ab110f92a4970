"""DBCache against cache-dit: the same decisions and the same trajectory online, and plans frozen from them or static.

`manager` is cache-dit's own bookkeeping without a model, driven with made-up values over thousands of evaluations; `peer`
is the whole of it, on tiny models.
"""

from __future__ import annotations

import copy
import inspect
import random

import pytest
import torch
from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, enable_cache
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager
from cache_dit.caching.cache_contexts.calibrators import (
    FoCaCalibratorConfig,
    TaylorSeerCalibrator,
    TaylorSeerCalibratorConfig,
)
from cache_dit.caching.cache_contexts.calibrators.foca import FoCaCalibrator
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from pydantic import ValidationError
from torch import Tensor, nn

from prebake.exporter.caches import Trajectory
from prebake.exporter.caches.common.calibration import Calibration, DecisionShares, decision_parameters
from prebake.exporter.caches.dbcache import DBCache, decision, find_block_lists, forecast_weights, marks, schedule
from prebake.exporter.calibrators import dbcache
from prebake.exporter.calibrators.dynamic_replay import DynamicTrace, dynamic_replay
from prebake.exporter.plan import make_plans
from prebake.exporter.plan.sampler import SchedulerTable
from prebake.exporter.sites.component import Component
from prebake.exporter.sites.layout import Layout, Place
from prebake.runtime.errors import ExportError, RecipeError
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.variant_compiler import compiled_run

TABLES = {
    "ddim": lambda n: peers.table_of(DDIMScheduler(clip_sample=False), n),
    "flow": lambda n: peers.table_of(FlowMatchEulerDiscreteScheduler(shift=3.0), n),
    "heun": lambda n: peers.table_of(HeunDiscreteScheduler(), n),
}
PATTERNS = {
    "flux": (ForwardPattern.Pattern_1, ForwardPattern.Pattern_1),
    "cogvideox": (ForwardPattern.Pattern_0,),
    "sd3": (ForwardPattern.Pattern_1,),
    "pixart": (ForwardPattern.Pattern_3,),
}
OURS = {"method", "calibration", "quorum", "calibrator_type", "calibrator_cache_type", "taylorseer_order"}
# float32, relative: forecasts add their terms in another order, and the latents of random weights grow what that leaves;
# a block too many or too few is off by 1e-2
TOLERANCE = 2e-5


def config(cache: DBCache, evaluations: int) -> DBCacheConfig:
    """cache-dit's table with the same values; it wants the number of evaluations."""
    values = cache.model_dump(exclude=OURS) | {"num_inference_steps": evaluations}
    mask = values["steps_computation_mask"]
    return DBCacheConfig(**values | {"steps_computation_mask": None if mask is None else list(mask)})


def calibrator(cache: DBCache):
    shared = {"calibrator_cache_type": cache.calibrator_cache_type}
    if cache.calibrator_type == "taylorseer":
        return TaylorSeerCalibratorConfig(taylorseer_order=cache.taylorseer_order, **shared)
    return FoCaCalibratorConfig(**shared) if cache.calibrator_type else None


# cache-dit's bookkeeping


def a_list(count: int, branches: tuple[str, ...]) -> Layout:
    return Layout(
        tuple(
            Place(f"blocks.{i}", b, f"{b}.blocks.{i}", "block", ("hidden_states",))
            for b in branches
            for i in range(count)
        ),
        branches,
    )


def random_rule(rng: random.Random, evaluations: int) -> DBCache:
    """Every key that a decision can depend on, at values where it matters."""
    mask = (1, *(rng.randint(0, 1) for _ in range(evaluations - 1)))
    separate = rng.choice([None, False, True])
    first = bool(separate) and rng.random() < 0.3
    return DBCache(
        Fn_compute_blocks=1,
        residual_diff_threshold=rng.choice([0.05, 0.1, 0.2, 0.5, 1.0, -1.0]),
        max_accumulated_residual_diff_threshold=rng.choice([None, None, 0.0, 0.4, 1.5]),
        max_warmup_steps=rng.randint(0, 6),
        warmup_interval=rng.randint(1, 3),
        max_cached_steps=rng.choice([-1, -1, 0, 3, 6]),
        max_continuous_cached_steps=rng.choice([-1, -1, 0, 1, 2, 3]),
        enable_separate_cfg=separate,
        cfg_compute_first=first,
        cfg_diff_compute_separate=not first and rng.random() < 0.5,
        steps_computation_mask=rng.choice([None, mask]),
        steps_computation_policy=rng.choice(["dynamic", "static"]),
        force_refresh_step_hint=rng.choice([None, None, 4, 6, 10]),
        force_refresh_step_policy=rng.choice(["once", "repeat"]),
    )


def manager(cache: DBCache, values: list[dict[str, Tensor]]) -> list[dict[str, bool]]:
    """What cache-dit decides when the first blocks add `values`, one entry for each branch."""
    made = CachedContextManager("made", persistent_context=True)
    made.reset_context("blocks", cache_config=config(cache, len(values)))

    def call(value: Tensor) -> bool:
        made.set_context("blocks")
        made.mark_step_begin()
        if made.can_cache(value):
            made.add_cached_step()
            return False
        made.set_Fn_buffer(value)
        return True

    decided = []
    for step in values:
        if cache.enable_separate_cfg and len(step) == 2:
            order = ("uncond", "cond") if cache.cfg_compute_first else ("cond", "uncond")
            decided.append({f"{b}/blocks": call(step[b]) for b in order})
        else:
            together = call(torch.cat(list(step.values())))
            decided.append({f"{b}/blocks" if b else "blocks": together for b in step})
    return decided


def walk(rng: random.Random, branches: tuple[str, ...], evaluations: int) -> list[dict[str, Tensor]]:
    seeded = torch.Generator().manual_seed(rng.randrange(10**6))
    now = {b: torch.randn(1, 5, generator=seeded) for b in branches}
    steps = []
    for _ in range(evaluations):
        stride = rng.choice([0.03, 0.1, 0.3])
        now = {b: x + stride * torch.randn(1, 5, generator=seeded) for b, x in now.items()}
        steps.append(now)
    return steps


def test_every_counter_and_test_decides_as_in_cache_dit():
    rng = random.Random(0)
    skipped = 0
    for _ in range(500):
        branches = rng.choice([("",), ("uncond", "cond")])
        evaluations = rng.randint(1, 24)
        cache = random_rule(rng, evaluations)
        if branches == ("",):  # a model of one branch, whose every other call cache-dit would take for another
            cache = cache.model_copy(update={"enable_separate_cfg": None})
        layout = a_list(3, branches)
        values = walk(rng, branches, evaluations)
        online = dbcache.OnlineRule(cache, layout, TABLES["ddim"](2))
        tensors = dict(
            zip(
                branches, (dbcache.find_hidden_tensor(p, "dbcache") for p in dbcache.probes(cache, layout)), strict=True
            )
        )
        got = [online.decide(e, 0.0, {tensors[b]: x for b, x in step.items()}) for e, step in enumerate(values)]
        expected = manager(cache, values)
        assert got == expected, cache
        skipped += sum(not c for step in got for c in step.values())
    assert skipped > 1000


def test_decisions_that_no_data_can_change_need_no_calibration():
    rng = random.Random(1)
    tried = 0
    while tried < 100:
        evaluations = rng.randint(2, 24)
        cache = random_rule(rng, evaluations)
        if not cache.data_free:
            continue
        tried += 1
        layout = a_list(3, ("uncond", "cond"))
        got = schedule(cache, layout, Trajectory(tuple(map(float, range(evaluations)))), None)
        expected = manager(cache, walk(rng, layout.branches, evaluations))
        names = {b.key: m.name for b, m in zip(find_block_lists(cache, layout), got.marks, strict=True)}
        assert [
            {k: d.actions.get(n, "compute") == "compute" for k, n in names.items()} for d in got.decisions
        ] == expected


@pytest.mark.parametrize("kind", ["taylorseer", "foca"])
def test_forecasts_are_the_calibrators_of_cache_dit(kind):
    rng = random.Random(2)
    for _ in range(300):
        order = rng.randint(0, 4)
        cache = DBCache(calibrator_type=kind, taylorseer_order=order)
        theirs = TaylorSeerCalibrator(n_derivatives=order) if kind == "taylorseer" else FoCaCalibrator()
        computed = [True, *(rng.random() < 0.5 for _ in range(rng.randint(1, 20)))]
        generations: list[float] = []
        for e, c in enumerate(computed):
            theirs.mark_step_begin()
            if c:
                generations.insert(0, rng.uniform(-2, 2))
                theirs.update(torch.tensor(generations[0], dtype=torch.float64), name="x")
                continue
            weights = forecast_weights(cache, computed[: e + 1], 64)
            filled = [*generations, *[generations[-1]] * 64]
            ours = sum(w * g for w, g in zip(weights, filled, strict=False))
            # float64; a high order over uneven gaps magnifies the last bits
            assert theirs.approximate("x").item() == pytest.approx(ours, rel=1e-9, abs=1e-9)
            if kind == "foca":
                generations.insert(0, ours)


# the whole of cache-dit


class Sequential(nn.Module):
    """Guidance by two calls of one model, the conditional one first, as in Wan's pipeline."""

    def __init__(self, guided: nn.Module) -> None:
        super().__init__()
        self.one = copy.deepcopy(guided.cond)
        self.inputs, self.doubled = guided.inputs, guided.doubled

    def forward(self, *tensors: Tensor) -> Tensor:
        *own, guidance = tensors
        outputs = {}
        for k, branch in ((1, "cond"), (0, "uncond")):
            self.one.model.branches = (branch,)
            given = zip(self.inputs, own, strict=True)
            outputs[branch] = self.one(*(t[:, k] if name in self.doubled else t for name, t in given))
        return outputs["uncond"] + guidance * (outputs["cond"] - outputs["uncond"])


def peer(
    kind: str, component: Component, cache: DBCache, table: SchedulerTable, latents: Tensor, inputs=None
) -> peers.Run:
    """cache-dit's run; `ran` has the blocks, by branch."""
    layout = layout_of(component)
    if cache.enable_separate_cfg:
        names, args = component.inputs, component.args
        component = Component("denoiser", Sequential(component.module), names, ("sample",), args, {"": "one.model."})
    ran: list[set[str]] = [set() for _ in table.timesteps]

    def record(model: nn.Module, name: str, clock: peers.Clock) -> None:
        block = model.get_submodule(name)
        forward = block.forward

        def recorded(*args, **kwargs):
            ran[clock.e].update(f"{b}/{name}" if b else name for b in model.branches)
            return forward(*args, **kwargs)

        recorded.__signature__ = inspect.signature(forward)
        block.forward = recorded

    def apply(model: nn.Module, clock: peers.Clock) -> None:
        model.branches = layout.branches
        names = [p.name for p in layout.blocks(layout.branches[0])]
        for name in names:
            record(model, name, clock)
        blocks = [getattr(model, n) for n in dict.fromkeys(n.rpartition(".")[0] for n in names)]
        adapter = BlockAdapter(transformer=model, blocks=blocks, forward_pattern=list(PATTERNS[kind]))
        enable_cache(adapter, cache_config=config(cache, len(table.timesteps)), calibrator_config=calibrator(cache))

    run = peers.peer_replay(component, table, latents, apply, inputs=inputs)
    run.ran = ran
    return run


def dynamic(component: Component, cache: DBCache, table: SchedulerTable, latents: Tensor, inputs=None) -> DynamicTrace:
    layout = layout_of(component)
    return dynamic_replay(
        component, marks(cache, layout), dbcache.probes(cache, layout), dbcache.OnlineRule(cache, layout, table),
        lambda history: decision(cache, layout, history), table, inputs or peers.inputs_of(component), latents,
    )  # fmt: skip


def ran(cache: DBCache, layout: Layout, decisions: list[dict[str, bool]]) -> list[set[str]]:
    """The blocks that run: all of them but the middle ones of the lists that skip."""
    sites = {p.path: p.site for p in layout.of("block")}
    middles = {
        b.key: {sites[path] for path in m.modules}
        for b, m in zip(find_block_lists(cache, layout), marks(cache, layout), strict=True)
    }
    return [
        set(sites.values()) - set().union(*(middles[k] for k, computes in decided.items() if not computes))
        for decided in decisions
    ]


def latents_of(component: Component, seed: int) -> Tensor:
    return torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(seed))


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    scale = max(t.abs().max() for t in theirs)
    return all((a - b).abs().max() <= TOLERANCE * scale for a, b in zip(ours, theirs, strict=True))


def model(kind: str) -> Component:
    """A tiny model of that kind with enough blocks for a first, a middle and a last part; guided but for FLUX."""
    if kind == "flux":
        return denoisers.flux(layers=4, single=3)
    return denoisers.with_guidance(denoisers.DITS[kind](layers=4))


CASES = {
    "both lists of flux": ("flux", "ddim", 12, 0.5, {}),
    "last blocks and a limit": ("flux", "flow", 12, 0.6, {"Bn_compute_blocks": 1, "max_continuous_cached_steps": 2}),
    "taylorseer": ("flux", "flow", 14, 0.5, {"calibrator_type": "taylorseer", "taylorseer_order": 2}),
    "foca": ("flux", "ddim", 14, 0.5, {"max_warmup_steps": 3, "calibrator_type": "foca"}),
    "whole states": (
        "flux", "flow", 10, 0.6, {"calibrator_type": "taylorseer", "calibrator_cache_type": "hidden_states"},
    ),
    "heun": ("flux", "heun", 6, 0.5, {}),
    "branches together": ("cogvideox", "ddim", 10, 0.25, {}),
    "branches apart": ("cogvideox", "ddim", 10, 0.25, {"enable_separate_cfg": True}),
    "one difference for both": (
        "sd3", "flow", 10, 0.35, {"enable_separate_cfg": True, "cfg_diff_compute_separate": False},
    ),
    "a refresh": ("pixart", "ddim", 10, 0.2, {"force_refresh_step_hint": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_online_decisions_and_trajectory_are_those_of_cache_dit(name):
    kind, scheduler, steps, threshold, keys = CASES[name]
    cache = DBCache(**{"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": threshold} | keys)
    table = TABLES[scheduler](steps)
    component = model(kind)
    latents = latents_of(component, steps)
    ours = dynamic(component, cache, table, latents)
    theirs = peer(kind, component, cache, table, latents)
    assert ran(cache, layout_of(component), ours.decisions) == theirs.ran
    assert close([*ours.outputs, ours.latents], [*theirs.outputs, theirs.latents])
    decided = {c for d in ours.decisions[cache.max_warmup_steps :] for c in d.values()}
    assert decided == {True, False}


MASK = (1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1)
STATIC = {"Fn_compute_blocks": 1, "steps_computation_mask": MASK, "steps_computation_policy": "static"}
FORECASTS = {
    "reuse": {},
    "taylorseer": {"calibrator_type": "taylorseer"},
    "foca": {"calibrator_type": "foca"},
}


@pytest.mark.parametrize("name", FORECASTS)
def test_a_static_mask_is_a_plan_without_calibration(name):
    cache = DBCache(**STATIC, **FORECASTS[name])
    component, table = model("flux"), TABLES["flow"](len(MASK))
    planned = make_plans(cache, layout_of(component), {len(MASK): table})
    latents = latents_of(component, 0)
    ours = peers.ours(component, planned, planned.plans[0], latents)
    theirs = peer("flux", component, cache, table, latents)
    decided = [{"transformer_blocks": bool(c), "single_transformer_blocks": bool(c)} for c in MASK]
    assert ran(cache, layout_of(component), decided) == theirs.ran
    assert close([*ours.outputs, ours.latents], [*theirs.outputs, theirs.latents])
    uncached = peers.ours(component, planned, planned.plans[1], latents)
    plain = peers.peer_replay(component, table, latents, lambda model, clock: None)
    assert close(uncached.outputs, plain.outputs)
    assert not close(ours.outputs, plain.outputs)


def test_the_comparison_can_fail():
    cache = DBCache(**STATIC)
    component, table = model("flux"), TABLES["flow"](len(MASK))
    latents = latents_of(component, 0)
    theirs = peer("flux", component, cache, table, latents)
    for keys in (FORECASTS["taylorseer"], {"steps_computation_mask": (*MASK[:-1], 0)}, {"Fn_compute_blocks": 2}):
        planned = make_plans(DBCache(**STATIC | keys), layout_of(component), {len(MASK): table})
        assert not close(peers.ours(component, planned, planned.plans[0], latents).outputs, theirs.outputs)


def prompts(component: Component, count: int) -> list[dict[str, Tensor]]:
    """Other texts for the same model."""
    seeded = torch.Generator().manual_seed(7)
    changed = ("encoder_hidden_states", "pooled_projections")
    return [
        {
            n: (1 + k) * torch.randn(t.shape, generator=seeded) if n in changed else t
            for n, t in peers.inputs_of(component).items()
        }
        for k in range(count)
    ]


def calibrated(cache: DBCache, table: SchedulerTable, runs: list[list[dict[str, bool]]]) -> Calibration:
    """The file that a calibration on these runs' decisions writes."""
    shares = {
        key: tuple(sum(run[e][key] for run in runs) / len(runs) for e in range(len(table.timesteps)))
        for key in runs[0][0]
    }
    return Calibration(
        model="tiny", sha256="0" * 64, scheduler=table.scheduler, steps=len(set(table.steps)),
        timesteps=table.timesteps, guidance_scale=1.0, prompts=len(runs), prompts_sha256="0" * 64, seeds=1,
        decisions={"dbcache": DecisionShares(parameters=decision_parameters(cache), computed=shares)},
    )  # fmt: skip


def test_a_frozen_plan_computes_where_most_of_cache_dits_runs_did():
    cache = DBCache(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.5)
    component, table = model("flux"), TABLES["ddim"](12)
    layout = layout_of(component)
    runs, theirs = [], []
    for seed, inputs in enumerate(prompts(component, 3)):
        latents = latents_of(component, seed)
        runs.append(dynamic(component, cache, table, latents, inputs).decisions)
        theirs.append(peer("flux", component, cache, table, latents, inputs).ran)
    made = calibrated(cache, table, runs)
    got = schedule(cache, layout, Trajectory(table.timesteps), made)
    blocks = {p.site for p in layout.of("block")}
    majority = [{b for b in blocks if sum(b in run[e] for run in theirs) >= 2} for e in range(12)]
    keys = [b.key for b in find_block_lists(cache, layout)]
    frozen = [
        {k: d.actions.get(m.name, "compute") == "compute" for k, m in zip(keys, got.marks, strict=True)}
        for d in got.decisions
    ]
    assert ran(cache, layout, frozen) == majority
    assert any(run != theirs[0] for run in theirs)  # so that there was something to vote on
    unanimous = schedule(cache.model_copy(update={"quorum": 0.1}), layout, Trajectory(table.timesteps), made)
    assert sum(len(d.actions) for d in unanimous.decisions) < sum(len(d.actions) for d in got.decisions)


@pytest.mark.slow
@pytest.mark.compiles
def test_a_frozen_plan_compiles():
    cache = DBCache(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.2, calibrator_type="taylorseer")
    component, table = denoisers.cogvideox(layers=3), TABLES["ddim"](8)
    latents = latents_of(component, 0)
    online = dynamic(component, cache, table, latents)
    planned = make_plans(cache, layout_of(component), {8: table}, calibrated(cache, table, [online.decisions]))
    eager = peers.ours(component, planned, planned.plans[0], latents)
    assert close([*eager.outputs, eager.latents], [*online.outputs, online.latents])
    artifact = compiled_run("cogvideox-3", component, planned, planned.plans[0], latents)
    # the compiler adds in another order; a wrong site or coefficient is off by 1e-2
    assert artifact.error(eager) < 2e-5


@pytest.mark.slow
@pytest.mark.compiles
def test_forecasts_that_are_stored_compile():
    mask = (1, 1, 0, 0, 1, 0)
    cache = DBCache(**STATIC | {"steps_computation_mask": mask, "calibrator_type": "foca"})
    component, table = denoisers.cogvideox(layers=3), TABLES["ddim"](6)
    planned = make_plans(cache, layout_of(component), {6: table})
    latents = latents_of(component, 0)
    eager = peers.ours(component, planned, planned.plans[0], latents)
    artifact = compiled_run("cogvideox-3", component, planned, planned.plans[0], latents)
    assert artifact.error(eager) < 2e-5  # as above


def test_more_blocks_than_a_list_has_are_refused_with_the_lists():
    layout = layout_of(model("flux"))
    for first, last in ((4, 0), (3, 1)):
        with pytest.raises(ExportError, match=r"transformer_blocks has 4, single_transformer_blocks has 3"):
            marks(DBCache(Fn_compute_blocks=first, Bn_compute_blocks=last), layout)
    only_double = marks(DBCache(Fn_compute_blocks=3), layout)
    assert [m.name for m in only_double] == ["transformer_blocks[3:4]"]


def test_a_list_whose_blocks_others_run_between_is_refused():
    order = ("a.0", "a.1", "b.0", "a.2", "b.1", "b.2")
    layout = Layout(tuple(Place(name, "", name, "block", ("hidden_states",)) for name in order))
    with pytest.raises(ExportError, match=r"those of a; .*a\.0, a\.1, b\.0, a\.2, b\.1, b\.2"):
        find_block_lists(DBCache(Fn_compute_blocks=1), layout)


def test_what_cache_dit_stumbles_over_is_refused_before_it_runs():
    component, table = denoisers.pixart(layers=4), TABLES["ddim"](3)
    layout, latents = layout_of(component), latents_of(component, 0)
    too_many = DBCache(Fn_compute_blocks=5)
    with pytest.raises(AssertionError, match="must be less than the number of transformer blocks 4"):
        peer("pixart", component, too_many, table, latents)
    with pytest.raises(ExportError, match="expected no more blocks than the shortest list has"):
        make_plans(too_many, layout, {3: table})

    overlapping = DBCache(Fn_compute_blocks=3, Bn_compute_blocks=2)
    first_twice = peer("pixart", component, overlapping, table, latents)  # its third block runs in both parts
    plain = peers.peer_replay(component, table, latents, lambda model, clock: None)
    assert not close(first_twice.outputs, plain.outputs)
    with pytest.raises(ExportError, match="expected no more blocks than the shortest list has"):
        make_plans(overlapping, layout, {3: table})

    from_nothing = {"Fn_compute_blocks": 1, "steps_computation_mask": (0, 1, 0), "steps_computation_policy": "static"}
    with pytest.raises(AssertionError, match="must be set before"):
        peer("pixart", component, DBCache.model_construct(**DBCache().model_dump() | from_nothing), table, latents)
    with pytest.raises(ValidationError, match="when there is nothing to reuse"):
        DBCache(**from_nothing)


def test_dynamic_decisions_need_a_calibration():
    cache, table = DBCache(Fn_compute_blocks=1), TABLES["ddim"](12)
    with pytest.raises(ExportError, match=r"'dbcache' needs a calibration"):
        make_plans(cache, layout_of(model("flux")), {12: table})


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(RecipeError, match=r"is for 13 evaluations, and the plan has 12"):
        make_plans(DBCache(**STATIC), layout_of(model("flux")), {12: TABLES["ddim"](12)})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"calibrator_type": "dmd"}, "fits its coefficients to the stored values at run time"),
        ({"steps_computation_mask": [0, 1], "steps_computation_policy": "static"}, "start it with 1"),
        ({"enable_separate_cfg": True, "cfg_compute_first": True}, "expected false where cfg_diff_compute_separate"),
        ({"enable_separate_cfg": True, "force_refresh_step_hint": 5}, "expected an even number, got 5"),
    ],
)
def test_what_no_plan_can_hold_is_refused_in_the_recipe(keys, sentence):
    with pytest.raises(ValidationError, match=sentence):
        DBCache(**keys)


def test_the_defaults_are_those_of_cache_dit():
    theirs = DBCacheConfig()
    for key, value in DBCache().model_dump(exclude=OURS).items():
        assert getattr(theirs, key) == value, key
    assert DBCache().taylorseer_order == TaylorSeerCalibratorConfig().taylorseer_order
