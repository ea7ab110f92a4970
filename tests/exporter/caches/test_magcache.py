"""MagCache against diffusers' own hooks: its decisions, its trajectories, and the ratios that its calibration prints."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    apply_mag_cache,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prebake.exporter.caches import MagCache, NoCache, Trajectory, schedule
from prebake.exporter.caches.common.calibration import Calibration
from prebake.exporter.caches.magcache import interpolate_ratios, scan_ratios
from prebake.exporter.calibrators.eager_replay import eager_variants
from prebake.exporter.calibrators.magnitudes import magnitude_ratio
from prebake.exporter.plan import make_plans
from prebake.runtime.errors import ExportError, RecipeError
from prebake.runtime.manifest import Site
from prebake.runtime.replay import DenoiserVariant, replay, tabulate_plan
from support import block_cache_patches as blocks
from support import cache_peers as peers
from support import tiny_denoisers as denoisers
from support.known_layouts import layout_of
from support.variant_compiler import compiled_run

SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(),
}
MADE = {}


def denoiser(name: str):
    if name not in MADE:
        component = (denoisers.DITS | denoisers.UNETS)[name.removesuffix("-cfg")]()
        component = denoisers.with_guidance(component) if name.endswith("-cfg") else component
        MADE[name] = component, layout_of(component)
    return MADE[name]


def start(component) -> torch.Tensor:
    return torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(0))


def config(cache: MagCache, evaluations: int, **more) -> MagCacheConfig:
    given = {k: getattr(cache, k) for k in ("threshold", "max_skip_steps", "retention_ratio")}
    ratios = FLUX_MAG_RATIOS if cache.mag_ratios == "flux" else torch.tensor(cache.mag_ratios or [1.0])
    return MagCacheConfig(**given, num_inference_steps=evaluations, mag_ratios=ratios, **more)


def bits(computes) -> str:
    return "".join("01"[c] for c in computes)


def planned_bits(cache: MagCache, name: str, table) -> list[str]:
    _, layout = denoiser(name)
    got = schedule(cache, layout, Trajectory(table.timesteps, table.sigmas, table.steps))
    return [bits(m.name not in d.actions for d in got.decisions) for m in got.marks]


# the decisions


class Blocks(torch.nn.Module):
    """The least model that diffusers' hooks go on: blocks of a class that its registry knows."""

    def __init__(self, count: int) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.transformer_blocks = torch.nn.ModuleList(BasicTransformerBlock(4, 1, 4) for _ in range(count))
        self.ran = []
        forward = self.transformer_blocks[0].forward

        def watched(hidden_states):
            self.ran[-1] = True
            return forward(hidden_states)

        self.transformer_blocks[0].forward = watched

    @torch.no_grad()
    def forward(self, x):
        self.ran.append(False)
        for block in self.transformer_blocks:
            x = block(x)
        return x


def diffusers_decisions(cache: MagCache, evaluations: int, count: int = 2) -> str:
    model = Blocks(count)
    apply_mag_cache(model, config(cache, evaluations))
    for e in range(evaluations):
        model(torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(e)))
    return bits(model.ran)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(80, 120).map(lambda n: n / 100), min_size=1, max_size=40),  # sums that meet thresholds exactly
    st.integers(1, 40),
    st.sampled_from((0.0, 0.01, 0.03, 0.06, 0.1, 0.24, 1.0)),
    st.integers(1, 6),
    st.floats(0, 1),
)
def test_every_decision_is_diffusers(ratios, evaluations, threshold, skips, retention):
    cache = MagCache(mag_ratios=ratios, threshold=threshold, max_skip_steps=skips, retention_ratio=retention)
    assert bits(scan_ratios(cache, interpolate_ratios(cache.mag_ratios, evaluations))) == diffusers_decisions(
        cache, evaluations
    )


def test_a_model_of_one_block_counts_every_evaluation_where_diffusers_stops_its_clock():
    """On purpose unlike diffusers: there the last block's hook counts, and of a single block it is not called on a skip."""
    cache = MagCache(mag_ratios="flux")
    ratios = interpolate_ratios(FLUX_MAG_RATIOS.tolist(), 28)
    assert bits(scan_ratios(cache, ratios)) == diffusers_decisions(cache, 28, count=2) == "1111110101000100010001001011"
    assert diffusers_decisions(cache, 28, count=1) != diffusers_decisions(cache, 28, count=2)


@given(st.integers(1, 120), st.integers(1, 120))
def test_ratios_are_interpolated_as_diffusers_does(have, want):
    ratios = [float(i) for i in range(have)]
    theirs = torch.tensor(ratios) if have == want else nearest_interp(torch.tensor(ratios), want)
    assert list(interpolate_ratios(ratios, want)) == theirs.tolist()


@pytest.mark.parametrize(
    ("cache", "mask"),
    [
        (MagCache(mag_ratios="flux"), "1111110101000100010001001011"),
        (MagCache(mag_ratios="flux", threshold=0.24, max_skip_steps=5, retention_ratio=0.1), "1110010001000001000001000010"),
    ],
)  # fmt: skip
def test_what_flux_ratios_give_at_28_steps(cache, mask):
    assert planned_bits(cache, "flux", peers.table_of(SCHEDULERS["shifted"](), 28)) == [mask]
    assert diffusers_decisions(cache, 28) == mask


# the trajectories


def sides(name: str, cache: MagCache, table):
    component, layout = denoiser(name)
    planned = make_plans(cache, layout, {len(set(table.steps)): table})
    ours = peers.ours(component, planned, planned.plans[0], start(component))
    peer = peers.peer_replay(
        component, table, start(component), lambda model, _: apply_mag_cache(model, config(cache, len(table.timesteps)))
    )
    return ours, peer


def check(name: str, cache: MagCache, table) -> None:
    ours, peer = sides(name, cache, table)
    _, layout = denoiser(name)
    got = schedule(cache, layout, Trajectory(table.timesteps, table.sigmas, table.steps))
    for branch in layout.branches:
        assert blocks.blocks_run(layout, got, branch) == blocks.blocks_ran(layout, peer)
    # float32 sums in another order; a wrong step is off by 1e-2, as the canary shows
    assert ours.error(peer) < 1e-5
    assert float((ours.latents - peer.latents).abs().max() / peer.latents.abs().max()) < 1e-5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from(("flux", "cogvideox-cfg", "sd3-cfg", "pixart-cfg", "cogvideox", "sd3")),
    st.sampled_from(tuple(SCHEDULERS)),
    st.integers(6, 14),
    st.sampled_from((0.06, 0.12, 0.3)),
    st.integers(1, 4),
    st.sampled_from((0.0, 0.2, 0.4)),
)
def test_the_blocks_and_the_trajectory_are_those_of_diffusers(name, scheduler, steps, threshold, skips, retention):
    cache = MagCache(mag_ratios="flux", threshold=threshold, max_skip_steps=skips, retention_ratio=retention)
    table = peers.table_of(SCHEDULERS[scheduler](), steps)
    if "0" not in planned_bits(cache, name, table)[0]:
        with pytest.raises(ExportError, match="skips nothing"):
            sides(name, cache, table)
    else:
        check(name, cache, table)


class InTurn(torch.nn.Module):
    """Guidance in two calls of one model, each in the branch's own cache context, as diffusers' newer pipelines do it."""

    def __init__(self, component) -> None:
        super().__init__()
        self.one = copy.deepcopy(component.module.cond)
        self.inputs, self.doubled = component.module.inputs, component.module.doubled

    def forward(self, *tensors):
        *own, guidance = tensors
        results = []
        for k, branch in enumerate(("uncond", "cond")):
            half = [t[:, k] if n in self.doubled else t for n, t in zip(self.inputs, own, strict=True)]
            with self.one.model.cache_context(branch):
                results.append(self.one(*half))
        uncond, cond = results
        return uncond + guidance * (cond - uncond)


def test_branches_are_kept_apart_as_diffusers_contexts_are():
    component, layout = denoiser("cogvideox-cfg")
    table = peers.table_of(SCHEDULERS["ddim"](), 9)
    cache = MagCache(mag_ratios="flux")
    in_turn = dataclasses.replace(component, module=InTurn(component), branches={"": "one.model."})
    planned = make_plans(cache, layout, {9: table})
    ours = peers.ours(component, planned, planned.plans[0], start(component))
    peer = peers.peer_replay(in_turn, table, start(component), lambda model, _: model.enable_cache(config(cache, 9)))
    got = schedule(cache, layout, Trajectory(table.timesteps))
    assert blocks.blocks_run(layout, got, "cond") == blocks.blocks_ran(layout, peer)
    assert ours.error(peer) < 1e-5  # as above


def test_the_comparison_can_fail():
    component, layout = denoiser("flux")
    table = peers.table_of(SCHEDULERS["shifted"](), 12)
    _, peer = sides("flux", MagCache(mag_ratios="flux"), table)
    other = make_plans(MagCache(mag_ratios="flux", threshold=0.3), layout, {12: table})
    assert peers.ours(component, other, other.plans[0], start(component)).error(peer) > 1e-3


def test_the_uncached_plan_is_the_plain_model():
    component, layout = denoiser("cogvideox-cfg")
    table = peers.table_of(SCHEDULERS["ddim"](), 8)
    planned, plain = (
        make_plans(MagCache(mag_ratios="flux"), layout, {8: table}),
        make_plans(NoCache(), layout, {8: table}),
    )
    uncached = peers.ours(component, planned, planned.plans[1], start(component))
    assert uncached.error(peers.ours(component, plain, plain.plans[0], start(component))) == 0.0


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", ["flux", "sd3-cfg"])
def test_the_compiled_plan_is_the_eager_one(name):
    component, layout = denoiser(name)
    table = peers.table_of(SCHEDULERS["ddim"](), 8)
    planned = make_plans(MagCache(mag_ratios="flux"), layout, {8: table})
    eager = peers.ours(component, planned, planned.plans[0], start(component))
    artifact = compiled_run(name.removesuffix("-cfg"), component, planned, planned.plans[0], start(component))
    # the compiler adds in another order; a wrong site is off by 1e-2
    assert artifact.error(eager) < 2e-5


# the calibration


def measured(name: str, table) -> dict[str, list[float]]:
    """Branch -> ratios, 1.0 first, from the residuals that an uncached plan stores."""
    component, layout = denoiser(name)
    cache = MagCache(mag_ratios=[1.0])
    planned = make_plans(cache, layout, {len(table.timesteps): table})
    full = eager_variants(component, planned)["full"]
    seen = []

    def call(named):
        seen.append(full.call(named))
        return seen[-1]

    sites = {m.name: Site(name=m.name, slots=m.slots, tensors=m.tensors) for m in planned.marks}
    inputs = peers.inputs_of(component)
    replay(
        tabulate_plan(planned.plans[1], torch.device("cpu")),
        {"full": DenoiserVariant(full.graph, call)},
        sites,
        inputs,
        start(component),
    )
    kept = {branch: mark.tensors[0] for branch, mark in zip(layout.branches, planned.marks, strict=True)}
    return {
        b: [1.0, *(magnitude_ratio(seen[e - 1][t], seen[e][t]) for e in range(1, len(seen)))] for b, t in kept.items()
    }


def printed(name: str, table, capsys) -> list[float]:
    """What diffusers prints when it calibrates."""
    component, _ = denoiser(name)
    n = len(table.timesteps)
    peers.peer_replay(
        component, table, start(component),
        lambda model, _: apply_mag_cache(model, MagCacheConfig(num_inference_steps=n, calibrate=True)),
    )  # fmt: skip
    (found,) = re.findall(r"^\[(?!MagCache)(.*)\]$", capsys.readouterr().out, re.MULTILINE)
    return [float(x) for x in found.split(", ")]


@pytest.mark.parametrize("name", ["flux", "sd3-cfg"])
def test_ratios_are_those_that_diffusers_prints(name, capsys):
    table = peers.table_of(SCHEDULERS["shifted"](), 9)
    ours, theirs = measured(name, table), printed(name, table, capsys)
    # one call of batch 2 gives diffusers the mean over both branches
    mean = [sum(column) / len(ours) for column in zip(*ours.values(), strict=True)]
    # means of float32 quotients in another order; the ratios themselves spread over more than 1e-3
    assert mean == pytest.approx(theirs, rel=1e-5)
    assert max(theirs) - min(theirs) > 1e-3


def calibration(magnitudes) -> Calibration:
    return Calibration(
        model="tiny", sha256="0", scheduler="DDIMScheduler", steps=8, timesteps=(1.0,) * 8, guidance_scale=3.0,
        prompts=1, prompts_sha256="0", seeds=1, magnitudes=magnitudes,
    )  # fmt: skip


def test_each_branch_follows_its_own_calibrated_ratios_where_diffusers_has_one_list():
    """On purpose unlike diffusers, whose one list and one context decide for both halves of the batch."""
    component, layout = denoiser("sd3-cfg")
    calm, wild = (1.0,) * 8, (1.0, 1.5) * 4
    table = peers.table_of(SCHEDULERS["ddim"](), 8)
    seen = calibration({"uncond": calm, "cond": wild})
    cache = MagCache()
    got = schedule(cache, layout, Trajectory(table.timesteps), seen)
    by_branch = {m.name: bits(m.name not in d.actions for d in got.decisions) for m in got.marks}
    assert by_branch == {
        f"{branch}/blocks[0:2]": diffusers_decisions(MagCache(mag_ratios=ratios), 8)
        for branch, ratios in (("uncond", calm), ("cond", wild))
    }
    assert len(set(by_branch.values())) == 2
    planned = make_plans(cache, layout, {8: table}, seen)
    ours = peers.ours(component, planned, planned.plans[0], start(component))
    both_calm = sides("sd3-cfg", MagCache(mag_ratios=calm), table)[1]
    assert ours.error(both_calm) > 1e-4  # diffusers cannot say this


def test_no_ratios_and_two_sources_of_them_are_refused():
    _, layout = denoiser("sd3-cfg")
    trajectory = Trajectory((900.0, 600.0))
    for seen in (None, calibration({}), calibration({"cond": (1.0,) * 8})):
        with pytest.raises(ExportError, match=r"branch 'uncond'; run `prebake calibrate .*mag_ratios"):
            schedule(MagCache(), layout, trajectory, seen)
    with pytest.raises(ValidationError, match=r"mag_ratios and calibration = 'a\.json' both say"):
        MagCache(mag_ratios="flux", calibration="a.json")


def test_the_number_of_steps_is_the_plans():
    _, layout = denoiser("flux")
    given = MagCache(mag_ratios="flux", num_inference_steps=2)
    assert schedule(given, layout, Trajectory((900.0, 600.0)))
    with pytest.raises(RecipeError, match=r"steps = 2, .* has 3 evaluations; leave the key out"):
        schedule(given, layout, Trajectory((900.0, 600.0, 300.0)))


def test_the_defaults_are_diffusers_but_for_the_steps():
    ours = MagCache().model_dump(exclude={"method", "calibration", "num_inference_steps"})
    theirs = MagCacheConfig(calibrate=True)
    assert ours == {name: getattr(theirs, name) for name in ours}


@pytest.mark.parametrize("ratios", ["fux", [], ["a"], [True], 3, {"a": 1.0}])
def test_what_is_no_list_of_ratios_is_refused(ratios):
    with pytest.raises(ValidationError, match=r"expected \"flux\" or a list of numbers"):
        MagCache(mag_ratios=ratios)


def test_a_unet_has_no_stack_of_blocks():
    with pytest.raises(ExportError, match=r"'magcache' needs a stack .*method 'deepcache'"):
        schedule(MagCache(mag_ratios="flux"), denoiser("sd")[1], Trajectory((900.0, 600.0)))
