"""DeepCache against the DeepCache package's helper and the paper's own functions, and what it saves on the real UNets."""

from __future__ import annotations

import ast
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import DeepCache as peer
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from prebake.exporter.caches import DeepCache, NoCache, Trajectory, schedule
from prebake.exporter.caches.deepcache import whole_evaluations
from prebake.exporter.capture.variants import capture_variants
from prebake.exporter.cost.count import count_cost
from prebake.exporter.cost.variants import check_variant_costs
from prebake.exporter.plan import make_plans
from prebake.exporter.progress import open_progress
from prebake.exporter.sites.marks import Variant
from prebake.runtime.errors import ExportError, RecipeError
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.output_liveness import living, ran
from support.variant_compiler import compiled_run

# float32 through eight evaluations; a stale layer that should be fresh, or the other way round, is off by 1e-3
TOLERANCE = 1e-5
IDS = [(name, b) for name, count in (("sd", 12), ("sdxl", 9)) for b in range(count)]
LISTED = {("sd", 0), ("sd", 1), ("sd", 5), ("sd", 11), ("sdxl", 0), ("sdxl", 3), ("sdxl", 8)}  # every module compared
SLOW = LISTED - {("sd", 0), ("sdxl", 8)}  # between the two ends
SMALL = {
    "sample_size": 8, "block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def ddim(steps: int):
    return peers.table_of(DDIMScheduler(clip_sample=False), steps)


def noise_for(component):
    return torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(7))


def helper(table, **params):
    """Puts the package's helper on a UNet; the timestep reaches it as a scalar, as pipelines pass it."""

    def apply(model, clock):
        scheduler = SimpleNamespace(timesteps=torch.tensor(table.timesteps))
        on = peer.DeepCacheSDHelper(pipe=SimpleNamespace(unet=model, scheduler=scheduler))
        on.set_params(**params)
        on.enable()
        wrapped = model.forward
        model.forward = lambda sample, timestep, **kwargs: wrapped(sample, timestep.flatten()[0], **kwargs)

    return apply


@pytest.fixture(scope="module")
def unets():
    """The tiny UNets by name, with their layouts."""
    made = {name: make() for name, make in denoisers.UNETS.items()}
    return {name: (component, layout_of(component)) for name, component in made.items()}


def both(component, layout, table, cache, **params):
    """The helper's run, ours, and our plan; `params` are the helper's where they are not the cache's own."""
    params = {"cache_interval": cache.cache_interval, "cache_branch_id": cache.cache_branch_id} | params
    planned = make_plans(cache, layout, {len(set(table.steps)): table})
    latents = noise_for(component)
    theirs = peers.peer_replay(component, table, latents, helper(table, **params))
    return theirs, peers.ours(component, planned, planned.plans[0], latents), planned


@pytest.mark.parametrize(
    ("name", "branch_id"), [pytest.param(*case, marks=pytest.mark.slow) if case in SLOW else case for case in IDS]
)
def test_every_branch_runs_what_the_helper_runs_and_reaches_its_outputs(unets, name, branch_id):
    component, layout = unets[name]
    cache = DeepCache(cache_interval=3, cache_branch_id=branch_id)
    theirs, ours, planned = both(component, layout, ddim(5), cache)
    chosen = [e.variant for e in planned.plans[0].evaluations]
    assert chosen == ["full", "reuse", "reuse", "full", "reuse"]
    (mark,) = planned.marks
    assert [mark.name in ran for ran in theirs.ran] == [v == "full" for v in chosen]
    if (name, branch_id) in LISTED:
        found = living(component, planned, FakeTensorMode(allow_non_fake_inputs=True))
        layers = [p for p in layout.places if p.kind in ("layer", "attention", "cross_attention", "feed_forward")]
        names = {p.site for p in layers}
        ours_ran = [{p.site for p in layers if p.path in found[v].modules} for v in chosen]
        assert ours_ran == [ran & names for ran in theirs.ran]
    assert ours.error(theirs) < TOLERANCE
    assert torch.allclose(ours.latents, theirs.latents, rtol=0, atol=TOLERANCE * float(theirs.latents.abs().max()))


@pytest.mark.parametrize(
    ("name", "branch_id"), [pytest.param("sd", 4, marks=pytest.mark.works("sd", "caches")), ("sdxl", 0)]
)
def test_under_guidance_each_branch_keeps_its_own_deep_feature(name, branch_id):
    component = denoisers.with_guidance(denoisers.UNETS[name]())
    table = peers.table_of(EulerDiscreteScheduler(timestep_spacing="trailing"), 6)
    cache = DeepCache(cache_interval=2, cache_branch_id=branch_id)
    theirs, ours, planned = both(component, layout_of(component), table, cache)
    assert [m.name.partition("/")[0] for m in planned.marks] == ["uncond", "cond"]
    assert ours.error(theirs) < TOLERANCE


@pytest.mark.parametrize("wrong", [{"cache_interval": 2}, {"cache_branch_id": 4}])
def test_the_comparison_can_fail(unets, wrong):
    theirs, ours, _ = both(*unets["sd"], ddim(6), DeepCache(cache_interval=3, cache_branch_id=3), **wrong)
    assert ours.error(theirs) > 10 * TOLERANCE


@pytest.fixture(scope="module")
def small():
    """UNets of two levels with one, two or three layers a block, and their layouts."""
    made = {n: denoisers.sd_unet(layers_per_block=n, **SMALL) for n in (1, 2, 3)}
    return {n: (component, layout_of(component)) for n, component in made.items()}


@pytest.mark.parametrize(("layers", "branch_id"), [(n, b) for n in (1, 2, 3) for b in range(6)])
def test_the_packages_ids_are_the_packages_whatever_the_layers_of_a_block(small, layers, branch_id):
    component, layout = small[layers]
    cache = DeepCache(cache_interval=2, cache_branch_id=branch_id, numbering="package")
    theirs, ours, _ = both(component, layout, ddim(4), cache)
    assert ours.error(theirs) < TOLERANCE


def test_the_two_numberings_differ_where_a_block_has_other_than_three_layers(small):
    component, layout = small[1]  # two up layers a block
    theirs, ours, _ = both(component, layout, ddim(4), DeepCache(cache_interval=2, cache_branch_id=2))
    assert ours.error(theirs) > 10 * TOLERANCE


SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "trailing": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "euler": lambda: EulerDiscreteScheduler(timestep_spacing="linspace"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
    "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_whole_evaluations_are_those_in_which_the_helper_ran_everything(small, data):
    layers = data.draw(st.sampled_from((1, 2, 3)))
    block, layer = data.draw(st.integers(0, 1)), data.draw(st.integers(0, min(layers, 2)))
    interval, steps = data.draw(st.integers(2, 6)), data.draw(st.integers(3, 9))
    table = peers.table_of(SCHEDULERS[data.draw(st.sampled_from(sorted(SCHEDULERS)))](), steps)
    component, layout = small[layers]
    # the helper divides ids by 3, which is right for 2 layers and 3 up layers a block
    cache = DeepCache(cache_interval=interval, cache_branch_id=(layers + 1) * block + layer)
    got = schedule(cache, layout, Trajectory(table.timesteps, table.sigmas, table.steps))
    theirs, ours, _ = both(component, layout, table, cache, cache_branch_id=3 * block + layer)
    (mark,) = got.marks
    assert [mark.name in ran for ran in theirs.ran] == [not d.actions for d in got.decisions]
    assert ours.error(theirs) < TOLERANCE


def test_heun_repeats_timesteps_and_the_helper_loses_the_phase(small):
    """The helper takes the first place of a timestep in the list: 0, 1, 1, 3, 3, 5, 5. At an interval of 2 it computes
    once and never again. We count evaluations, as the paper's loop does."""
    component, layout = small[2]
    table = peers.table_of(HeunDiscreteScheduler(), 4)
    cache = DeepCache(cache_interval=2)
    theirs, ours, planned = both(component, layout, table, cache)
    (mark,) = planned.marks
    assert [mark.name in ran for ran in theirs.ran] == [True] + [False] * 6
    assert [e.variant == "full" for e in planned.plans[0].evaluations] == [e % 2 == 0 for e in range(7)]
    assert ours.error(theirs) > 10 * TOLERANCE
    # told the evaluation instead of the timestep, the helper does what we do
    told = replace(table, timesteps=tuple(float(e) for e in range(7)))
    same = peers.peer_replay(component, table, noise_for(component), by_evaluation(told, cache_interval=2))
    assert ours.error(same) < TOLERANCE


def by_evaluation(table, **params):
    """The helper, which sees the number of the evaluation where it looks for the timestep."""

    def apply(model, clock):
        inner = model.forward
        model.forward = lambda sample, e, **kwargs: inner(sample, torch.tensor([timesteps[int(e)]]), **kwargs)
        timesteps = clock.table.timesteps
        helper(table, **params)(model, clock)
        wrapped = model.forward
        model.forward = lambda sample, timestep, **kwargs: wrapped(sample, torch.tensor([float(clock.e)]), **kwargs)

    return apply


def test_non_uniform_modes_are_names_without_code_in_the_helper(small):
    with pytest.raises(KeyError):
        both(*small[2], ddim(6), DeepCache(cache_interval=3, skip_mode="pow"), skip_mode="pow")


@pytest.fixture(scope="module")
def paper():
    """`sample_from_quad` and `sample_from_quad_center`, cut from the package's pipeline, which needs an older diffusers."""
    source = Path(peer.__file__).parent / "sd" / "pipeline_stable_diffusion.py"
    tree = ast.parse(source.read_text("utf-8"))
    names = {"np": np}
    chosen = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("sample_from_quad")]
    exec(compile(ast.Module(chosen, []), str(source), "exec"), names)
    return names


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    count=st.integers(2, 100),
    interval=st.integers(2, 10),
    power=st.floats(1.01, 3.0),
    center=st.none() | st.integers(0, 99),
)
def test_non_uniform_evaluations_are_the_papers(paper, count, interval, power, center):
    samples = count // interval + (count % interval != 0)
    mode = "pow" if center is None else "center"
    cache = DeepCache(cache_interval=interval, skip_mode=mode, pow=power, center=center)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, for the imaginary part that the original drops
        try:
            if center is None:
                theirs, _ = paper["sample_from_quad"](count, samples, power)
            else:
                theirs, _ = paper["sample_from_quad_center"](count, samples, center, power)
        except ValueError:
            with pytest.raises(RecipeError, match=r"no power between 1 and .* places"):
                whole_evaluations(cache, count)
            return
    assert whole_evaluations(cache, count) == {int(e) for e in theirs}


def test_non_uniform_modes_differ_from_uniform_and_are_dense_where_they_say():
    uniform, power, center = (
        sorted(whole_evaluations(DeepCache(cache_interval=5, **chosen), 50))
        for chosen in ({}, {"skip_mode": "pow", "pow": 1.4}, {"skip_mode": "center", "pow": 1.4, "center": 15})
    )
    assert uniform == list(range(0, 50, 5))
    assert power == [0, 1, 5, 9, 13, 18, 24, 30, 36, 43]
    assert center == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]


def test_an_uncached_plan_is_the_plain_model(unets):
    component, layout = unets["sdxl"]
    planned = make_plans(DeepCache(cache_interval=2), layout, {4: ddim(4)})
    plain = make_plans(NoCache(), layout, {4: ddim(4)})
    latents = noise_for(component)
    ours = peers.ours(component, planned, planned.plans[1], latents)
    assert torch.equal(ours.latents, peers.ours(component, plain, plain.plans[0], latents).latents)


@pytest.mark.parametrize(("branch_id", "guidance"), [(0, False), pytest.param(4, True, marks=pytest.mark.slow)])
def test_pruned_graphs_hold_what_the_tape_says_and_skip_what_is_promised(branch_id, guidance):
    component = denoisers.sd_unet(**SMALL)
    component = denoisers.with_guidance(component) if guidance else component
    planned = make_plans(DeepCache(cache_interval=2, cache_branch_id=branch_id), layout_of(component), {4: ddim(4)})
    planned, graphs = capture_variants(component, planned, open_progress("quiet"))
    costs = {g.name: count_cost(g) for g in graphs}
    found = living(component, planned, FakeTensorMode(allow_non_fake_inputs=True))
    assert {name: c.flops for name, c in costs.items()} == {name: f.flops for name, f in found.items()}
    check_variant_costs(component, planned, costs)


@pytest.mark.slow
@pytest.mark.compiles
def test_the_artifacts_code_is_our_eager_replay():
    component = denoisers.sd_unet(**SMALL)
    planned = make_plans(DeepCache(cache_interval=2, cache_branch_id=1), layout_of(component), {5: ddim(5)})
    latents = noise_for(component)
    eager = peers.ours(component, planned, planned.plans[0], latents)
    artifact = compiled_run("sd small", component, planned, planned.plans[0], latents)
    # the compiler adds in another order
    assert artifact.error(eager) < 2e-5
    assert peers.ours(component, planned, planned.plans[1], latents).error(eager) > 1e-4  # the cache did something


SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}  # fmt: skip


def real(name, size, layout):
    """A UNet of the real widths, all of whose tensors are fake, for 77 text tokens. Its layout is the tiny one's."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    config = {"sd": SD15, "sdxl": SDXL}[name] | {"sample_size": size, "norm_num_groups": 32}
    with fake:
        component = denoisers.UNETS[name](**config)
        text = torch.empty(1, 77, config["cross_attention_dim"])
    named = dict(zip(component.inputs, component.args, strict=True)) | {"encoder_hidden_states": text}
    return replace(component, args=tuple(named.values())), layout, fake


@pytest.mark.parametrize(
    ("name", "size", "parameters", "shares", "most"),
    [
        pytest.param("sd", 64, 859.5e6, {0: 0.079, 1: 0.224, 2: 0.380}, 0.085, marks=pytest.mark.slow),
        ("sd", 16, 859.5e6, {}, 0.085),
        pytest.param(
            "sdxl",
            128,
            2567.5e6,
            {0: 0.015, 1: 0.038, 2: 0.066, 3: 0.129, 4: 0.214, 5: 0.306},
            0.02,
            marks=pytest.mark.slow,
        ),
        ("sdxl", 32, 2567.5e6, {}, 0.02),
    ],
)
def test_reuse_costs_on_the_real_configurations(unets, name, size, parameters, shares, most):
    """`shares` of the full FLOPs by branch id are those of the helper's own runs at 512 x 512 and 1024 x 1024."""
    component, layout, fake = real(name, size, unets[name][1])
    assert sum(p.numel() for p in component.module.parameters()) == pytest.approx(parameters, rel=1e-4)
    plans = {
        b: make_plans(DeepCache(cache_interval=3, cache_branch_id=b), layout, {3: ddim(3)}) for b in {0: 0} | shares
    }
    marks = tuple(m for planned in plans.values() for m in planned.marks)
    full, stored = ran(component, marks, Variant("full", ()), fake, {})
    cost_of = {b: ran(component, p.marks, p.variants[1], fake, stored)[0].flops / full.flops for b, p in plans.items()}
    assert {b: cost_of[b] for b in shares} == pytest.approx(shares, abs=0.0006)
    assert cost_of[0] <= most
    for interval, speedup in ((3, 2.3), (5, 3.2)):
        (chosen, _) = make_plans(DeepCache(cache_interval=interval), layout, {30: ddim(30)}).plans
        done = sum(1 if e.variant == "full" else cost_of[0] for e in chosen.evaluations)
        assert 30 / done >= speedup


def test_an_id_without_an_up_layer_is_refused_with_those_that_exist():
    layout = layout_of(denoisers.sdxl_unet())
    with pytest.raises(
        ExportError,
        match=r"cache_branch_id 9 is .* 0 = up_.*, .* 8 = up_blocks\.0",
    ):
        make_plans(DeepCache(cache_interval=2, cache_branch_id=9), layout, {4: ddim(4)})


def test_an_id_that_the_package_has_not_is_refused_with_those_that_exist(small):
    with pytest.raises(ExportError, match=r"cache_branch_id 6 is not an up layer .* 5 = up_blocks\.0\.resnets\.0$"):
        make_plans(DeepCache(cache_interval=2, cache_branch_id=6, numbering="package"), small[1][1], {4: ddim(4)})


def test_a_transformer_is_refused():
    with pytest.raises(ExportError, match=r"'deepcache' is for UNets: the model has no up_blocks"):
        make_plans(DeepCache(cache_interval=2), layout_of(denoisers.pixart()), {4: ddim(4)})


def test_the_packages_default_interval_skips_nothing_and_is_refused():
    with pytest.raises(ExportError, match=r"cache\.method 'deepcache' skips nothing at 4 steps"):
        make_plans(DeepCache(), layout_of(denoisers.sd_unet(**SMALL)), {4: ddim(4)})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"skip_mode": "center"}, "needs the evaluation to be dense at"),
        ({"skip_mode": "pow", "center": 3}, 'skip_mode = "pow" has no center'),
        ({"pow": 1.4}, 'skip_mode = "uniform" has no power'),
        ({"skip_mode": "sometimes"}, "'uniform', 'pow' or 'center'"),
        ({"cache_interval": 0}, "greater than or equal to 1"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        DeepCache(**keys)
