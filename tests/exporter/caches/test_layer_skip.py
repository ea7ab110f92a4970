"""Layer skip against diffusers' hooks where those work, against the same hooks mended where they fail, and both shown."""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LayerSkipConfig
from diffusers.guiders import ClassifierFreeGuidance, PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import HookRegistry, apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prebake.exporter.caches import LayerSkip, NoCache, Trajectory, schedule
from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.capture.variants import capture_variants
from prebake.exporter.cost.count import count_attention_ops, count_cost
from prebake.exporter.cost.variants import check_variant_costs
from prebake.exporter.plan import make_plans
from prebake.exporter.progress import open_progress
from prebake.runtime.errors import ExportError
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.variant_compiler import compiled_run

# float32 through a few evaluations of the same operations; a layer that is skipped or not is off by 1e-1
TOLERANCE = 1e-5
PARTS = {
    "block": {},
    "attention": {"skip_ff": False},
    "ff": {"skip_attention": False},
    "scores": {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True},
    "scores and ff": {"skip_attention": False, "skip_attention_scores": True},
}
AS_IS = [
    ("cogvideox", "block"), ("cogvideox", "ff"), ("sd3", "ff"), ("pixart", "block"), ("pixart", "attention"),
    ("pixart", "ff"), ("pixart", "scores"), ("pixart", "scores and ff"), ("flux", "ff"),
]  # fmt: skip
MENDED = [
    (name, part) for name in ("cogvideox", "sd3", "flux", "flux single") for part in ("attention", "scores")
]  # fmt: skip
DOUBLE, SINGLE = {"fqn": "transformer_blocks"}, {"fqn": "single_transformer_blocks"}


def fqn_of(name):
    return {"flux": DOUBLE, "flux single": SINGLE}.get(name, {})


def table_of(steps, scheduler=None):
    return peers.table_of(scheduler or DDIMScheduler(clip_sample=False), steps)


def noise_for(component):
    return torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def dits():
    """The tiny transformers by name, of two blocks, with their layouts."""
    made = {name: make() for name, make in denoisers.DITS.items()}
    made["flux single"] = made["flux"]
    return {name: (component, layout_of(component)) for name, component in made.items()}


def replayed(component, layout, cache, table):
    planned = make_plans(cache, layout, {len(set(table.steps)): table})
    return peers.ours(component, planned, planned.plans[0], noise_for(component)), planned


def hooked(component, table, **config):
    """The run with diffusers' own hooks on at every step."""
    return peers.peer_replay(
        component, table, noise_for(component), lambda model, _: apply_layer_skip(model, LayerSkipConfig(**config))
    )


@pytest.mark.parametrize(("name", "part"), AS_IS)
def test_skipped_layers_are_those_of_diffusers_hooks(dits, name, part):
    component, layout = dits[name]
    config = {"indices": [0], **fqn_of(name), **PARTS[part]}
    table = table_of(3)
    ours, planned = replayed(component, layout, LayerSkip(**config), table)
    theirs = hooked(component, table, **config)
    skipped = {m.name for m in planned.marks if m.part == "output"}
    every = {p.site for p in layout.places}
    inside = {p for p in every if any(p.startswith(f"{s}.") for s in skipped)}
    assert theirs.ran == [every - skipped - inside] * 3
    assert ours.error(theirs) < TOLERANCE
    assert torch.allclose(ours.latents, theirs.latents, rtol=0, atol=TOLERANCE * float(theirs.latents.abs().max()))


# --- where diffusers' hooks fail ------------------------------------------------------------------------------------


def streams(_, hidden_states, encoder_hidden_states=None, **kwargs):
    """What a skipped attention must return: as many streams as it was given."""
    return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


@pytest.fixture
def mended(monkeypatch):
    """diffusers with the three processors registered, and with the attribute that its hook asks of every attention."""
    AttentionProcessorRegistry._register()
    for processor in (CogVideoXAttnProcessor2_0, JointAttnProcessor2_0, FluxAttnProcessor):
        monkeypatch.setitem(AttentionProcessorRegistry._registry, processor, AttentionProcessorMetadata(streams))
    monkeypatch.setattr(FluxAttention, "is_cross_attention", False, raising=False)


@pytest.mark.parametrize(("name", "part"), MENDED)
def test_attentions_that_diffusers_refuses_are_skipped_as_its_hooks_would(dits, mended, name, part):
    component, layout = dits[name]
    config = {"indices": [0], **fqn_of(name), **PARTS[part]}
    table = table_of(3)
    ours, _ = replayed(component, layout, LayerSkip(**config), table)
    assert ours.error(hooked(component, table, **config)) < TOLERANCE


@pytest.mark.parametrize("part", ["attention", "scores"])
@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("cogvideox", ValueError, "CogVideoXAttnProcessor2_0'> not registered"),
        ("sd3", ValueError, "JointAttnProcessor2_0'> not registered"),
        ("flux", AttributeError, "'FluxAttention' object has no attribute 'is_cross_attention'"),
    ],
)
def test_diffusers_own_hooks_refuse_these_attentions(dits, name, part, error, sentence):
    with pytest.raises(error, match=sentence):
        hooked(dits[name][0], table_of(2), indices=[0], **fqn_of(name), **PARTS[part])


def test_with_that_attribute_a_flux_double_block_gets_one_stream_and_needs_two(dits, monkeypatch):
    monkeypatch.setattr(FluxAttention, "is_cross_attention", False, raising=False)
    config = {"indices": [0], **DOUBLE, **PARTS["attention"]}
    with pytest.raises(UnboundLocalError):
        hooked(dits["flux"][0], table_of(2), **config)


def without(component, fqn, index):
    """The component with that block really taken out."""
    model = copy.deepcopy(component)
    owner = model.module.model
    setattr(owner, fqn, nn.ModuleList(b for i, b in enumerate(getattr(owner, fqn)) if i != index))
    return model


@pytest.mark.parametrize(
    ("name", "fqn"),
    [("flux", "transformer_blocks"), ("flux", "single_transformer_blocks"), ("sd3", "transformer_blocks")],
)
def test_a_skipped_block_is_no_block_where_diffusers_swaps_text_and_image(dits, name, fqn):
    """diffusers returns (image, text) for every block with two streams; these return (text, image)."""
    component, layout = dits[name]
    table = table_of(3)
    ours, _ = replayed(component, layout, LayerSkip(indices=(0,), fqn=fqn), table)
    taken_out = without(component, fqn, 0)
    truth, _ = replayed(taken_out, layout_of(taken_out), NoCache(), table)
    assert ours.error(truth) == 0
    model = copy.deepcopy(component.module)
    apply_layer_skip(model.model, LayerSkipConfig(indices=[0], fqn=fqn))
    with torch.no_grad():
        if name == "sd3":
            with pytest.raises(RuntimeError, match="is invalid for input of size"):
                model(*component.args)
        else:
            assert model(*component.args).shape == (1, 8, 16)  # the text's 8 tokens for the image's 64


def test_the_last_sd3_block_has_no_text_to_hand_on(dits):
    component, layout = dits["sd3"]
    ours, planned = replayed(component, layout, LayerSkip(indices=(1,)), table_of(3))
    assert planned.marks[0].streams == ("", "hidden_states")
    plain, _ = replayed(component, layout, NoCache(), table_of(3))
    assert ours.error(plain) > 1e-2


# --- steps and branches ---------------------------------------------------------------------------------------------

SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_layers_are_skipped_in_the_range_in_which_classifier_free_guidance_would_guide(dits, data):
    """Hooks put on and taken off around each evaluation, as diffusers' guiders do."""
    name, part = data.draw(st.sampled_from([c for c in AS_IS if c[0] != "flux"]))
    indices = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True))
    start, stop = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
    steps = data.draw(st.integers(1, 8))
    table = table_of(steps, SCHEDULERS[data.draw(st.sampled_from(sorted(SCHEDULERS)))]())
    component, layout = dits[name]
    active = [int(start * steps) <= e < int(stop * steps) for e in range(steps)]
    cache = LayerSkip(indices=tuple(indices), start=start, stop=stop, **PARTS[part])
    got = schedule(cache, layout, Trajectory(table.timesteps, table.sigmas, table.steps))
    assert [bool(d.actions) for d in got.decisions] == active
    if not any(active):
        with pytest.raises(ExportError, match="'layer_skip' skips nothing"):
            replayed(component, layout, cache, table)
        return

    @contextmanager
    def guided(model, clock):
        if active[clock.e]:
            _apply_layer_skip_hook(model, LayerSkipConfig(indices=indices, **PARTS[part]), name="skip")
        yield
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("skip", recurse=True)

    theirs = peers.peer_replay(component, table, noise_for(component), lambda *_: None, call=guided)
    ours, _ = replayed(component, layout, cache, table)
    assert ours.error(theirs) < TOLERANCE
    outputs = {m.name for m in got.marks if m.part == "output"}
    assert [outputs - ran for ran in theirs.ran] == [outputs if on else set() for on in active]


def test_start_and_stop_count_as_classifier_free_guidance_counts_and_other_guiders_begin_one_step_later(dits):
    rng = random.Random(0)
    config, guided, late = LayerSkipConfig(indices=[0], fqn="transformer_blocks"), 0, 0
    for _ in range(100):
        start, stop, steps = *sorted((rng.random(), rng.random())), rng.randint(1, 60)
        plain = ClassifierFreeGuidance(start=start, stop=stop)
        others = (
            SkipLayerGuidance(skip_layer_guidance_start=start, skip_layer_guidance_stop=stop, skip_layer_config=config),
            PerturbedAttentionGuidance(
                perturbed_guidance_start=start, perturbed_guidance_stop=stop, perturbed_guidance_layers=[0]
            ),
        )
        trajectory = Trajectory(tuple(map(float, range(steps))))
        got = schedule(LayerSkip(indices=(0,), start=start, stop=stop), dits["pixart"][1], trajectory)
        skips = [e for e, d in enumerate(got.decisions) if d.actions]
        for guider in (plain, *others):
            on = []
            for step in range(steps):
                guider.set_state(step, steps, torch.tensor(0))
                on += [step] if (guider._is_cfg_enabled() if guider is plain else guider._is_slg_enabled()) else []
            assert on == (skips if guider is plain else skips[1:])
        guided, late = guided + len(skips), late + len(skips[1:])
    assert guided > late > 0


def test_under_guidance_both_branches_are_skipped_as_in_one_call_of_batch_2():
    component = denoisers.with_guidance(denoisers.cogvideox())
    table = table_of(3)
    ours, planned = replayed(component, layout_of(component), LayerSkip(indices=(0,)), table)
    assert [m.name for m in planned.marks] == ["uncond/transformer_blocks.0", "cond/transformer_blocks.0"]
    assert ours.error(hooked(component, table, indices=[0])) < TOLERANCE


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_one_branch_is_skipped_and_the_other_is_whole(branch):
    component = denoisers.with_guidance(denoisers.pixart())
    table = table_of(3)
    cache = LayerSkip(indices=(1,), branch=branch, **PARTS["attention"])
    ours, planned = replayed(component, layout_of(component), cache, table)
    assert [m.name for m in planned.marks] == [f"{branch}/transformer_blocks.1.attn1"]

    def apply(model, _):
        whole = model.forward

        def half(k, inputs):
            skips = ("uncond", "cond")[k] == branch
            if skips:
                _apply_layer_skip_hook(model, LayerSkipConfig(indices=[1], **PARTS["attention"]), name="skip")
            out = whole(**{n: t.chunk(2)[k] for n, t in inputs.items()}, return_dict=False)[0]
            if skips:
                HookRegistry.check_if_exists_or_initialize(model).remove_hook("skip", recurse=True)
            return out

        model.forward = lambda return_dict, **inputs: (torch.cat([half(k, inputs) for k in range(2)]),)

    assert ours.error(peers.peer_replay(component, table, noise_for(component), apply)) < TOLERANCE


def test_a_heun_step_skips_in_both_its_evaluations(dits):
    got = schedule(
        LayerSkip(indices=(0,), start=0.25, stop=0.75),
        dits["pixart"][1],
        Trajectory((999.0, 600.0, 600.0, 300.0, 300.0, 100.0, 100.0), (), (0, 0, 1, 1, 2, 2, 3)),
    )
    assert [bool(d.actions) for d in got.decisions] == [False, False, True, True, True, True, False]


def test_the_comparison_can_fail(dits):
    component, layout = dits["pixart"]
    table = table_of(3)
    for wrong in ({"indices": [1]}, {"indices": [0], "skip_ff": False}):
        ours, _ = replayed(component, layout, LayerSkip(indices=(0,)), table)
        assert ours.error(hooked(component, table, **wrong)) > 1e-2


def test_an_uncached_plan_is_the_plain_model(dits):
    component, layout = dits["cogvideox"]
    _, planned = replayed(component, layout, LayerSkip(indices=(0,)), table_of(3))
    plain, _ = replayed(component, layout, NoCache(), table_of(3))
    latents = noise_for(component)
    assert torch.equal(peers.ours(component, planned, planned.plans[1], latents).latents, plain.latents)


# --- what is compiled -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.compiles
def test_the_artifacts_code_is_our_eager_replay():
    component = denoisers.with_guidance(denoisers.pixart(layers=1))
    cache = LayerSkip(indices=(0,), branch="cond", stop=0.5, **PARTS["scores and ff"])
    table = table_of(4)
    eager, planned = replayed(component, layout_of(component), cache, table)
    latents = noise_for(component)
    artifact = compiled_run("pixart guided, one layer", component, planned, planned.plans[0], latents)
    assert artifact.error(eager) < 2e-5  # the compiler adds in another order
    assert peers.ours(component, planned, planned.plans[1], latents).error(eager) > 1e-4  # something was skipped


@pytest.mark.parametrize(("part", "attentions"), [("block", 2), ("attention", 3), ("ff", 4), ("scores", 3)])
def test_what_is_skipped_is_not_in_the_graph(dits, part, attentions):
    component, layout = dits["pixart"]
    table = table_of(2)
    planned = make_plans(LayerSkip(indices=(0,), **PARTS[part]), layout, {2: table})
    planned, graphs = capture_variants(component, planned, open_progress("quiet"))
    full, reuse = graphs
    assert [full.inputs, count_attention_ops(full)] == [reuse.inputs, 4]
    assert count_attention_ops(reuse) == attentions
    check_variant_costs(component, planned, {g.name: count_cost(g) for g in graphs})
    if part == "block":
        short = without(component, "transformer_blocks", 0)
        removed = capture_graph("short", short.module, short.args, short.inputs, short.outputs)
        assert count_cost(reuse).flops == count_cost(removed).flops


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "sentence"),
    [
        ("pixart", {"indices": (0, 7)}, r"cache\.indices \[7\] are not in the model; it has transformer_blocks\.0, transformer_blocks\.1"),
        ("pixart", {"indices": (0,), "fqn": "layers"}, r"cache\.fqn 'layers' is no list of blocks of the model; it has transformer_blocks"),
        ("flux", {"indices": (0,)}, r"'auto' needs a model with one list .*; it has transformer_blocks, single_transformer_blocks; name one"),
        ("flux", {"indices": (0,), **SINGLE, **PARTS["ff"]}, r"there is no feed_forward of its own in single_transformer_blocks\.0; the model has transformer_blocks\.0\.ff, "),
        ("pixart", {"indices": (0,), "branch": "cond"}, r"cache\.branch 'cond': the model runs without classifier-free guidance"),
    ],
)  # fmt: skip
def test_what_is_not_in_the_model_is_refused_with_what_is(dits, name, keys, sentence):
    with pytest.raises(ExportError, match=sentence):
        make_plans(LayerSkip(**keys), dits[name][1], {2: table_of(2)})


def test_a_flux_feed_forward_that_is_not_there_is_no_error_in_diffusers(dits):
    component, _ = dits["flux"]
    plain, _ = replayed(component, dits["flux"][1], NoCache(), table_of(2))
    assert hooked(component, table_of(2), indices=[0], **SINGLE, **PARTS["ff"]).error(plain) == 0


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"dropout": 0.5}, "0.5 drops at random, which no plan can replay"),
        ({"skip_attention_scores": True}, "exclude each other"),
        ({"skip_attention": False, "skip_ff": False}, "all are false"),
        ({"start": 0.5, "stop": 0.5}, "expected less than stop = 0.5"),
        ({"indices": ()}, "at least 1 item"),
        ({"indices": (-1,)}, "greater than or equal to 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        LayerSkip(**{"indices": (0,), **keys})
