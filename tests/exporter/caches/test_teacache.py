"""TeaCache against its published loop, written out here once more in plain eager code with none of our sites.

There is no package to compare with: ali-vilab/TeaCache replaces the forward of one model or another. `direct` does so too.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from pydantic import ValidationError
from torch import Tensor, nn

from prebake.exporter.caches import Trajectory
from prebake.exporter.caches.common.calibration import Calibration, DecisionShares, decision_parameters
from prebake.exporter.caches.teacache import POLYNOMIALS, ExactDecisions, TeaCache, decision, marks, schedule
from prebake.exporter.calibrators import teacache
from prebake.exporter.calibrators.dynamic_replay import DynamicTrace, dynamic_replay
from prebake.exporter.plan import make_plans
from prebake.exporter.plan.sampler import SchedulerTable
from prebake.exporter.sites.component import Component
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
# float32, relative: the residual is a difference in both; a decision that differs is off by 1e-2
TOLERANCE = 1e-5


@dataclass
class Memory:
    """What the published forward keeps on the model's class; for two branches there is one of each."""

    cnt: int = 0
    accumulated: float = 0.0
    previous: Tensor | None = None
    residuals: tuple[Tensor, ...] = ()


@dataclass
class Direct:
    """The published loop: `computed` gets one {branch: bool} an evaluation, in the order in which they are called."""

    num_steps: int
    thresh: float
    coefficients: tuple[float, ...]
    ret_steps: int = 1
    cutoff_steps: int = 0
    memories: dict[str, Memory] = field(default_factory=lambda: defaultdict(Memory))
    computed: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    branch: str = ""

    def should_calc(self, signal: Tensor) -> bool:
        memory = self.memories[self.branch]
        if memory.cnt < self.ret_steps or memory.cnt >= self.cutoff_steps:
            should, memory.accumulated = True, 0
        else:
            rescale_func = np.poly1d(self.coefficients)
            change = ((signal - memory.previous).abs().mean() / memory.previous.abs().mean()).cpu().item()
            memory.accumulated += rescale_func(change)
            should = not memory.accumulated < self.thresh
            if should:
                memory.accumulated = 0
        memory.previous = signal
        memory.cnt += 1
        self.computed[self.branch].append(should)
        return should

    def flux(self, model, hidden_states, timestep, encoder_hidden_states, pooled_projections, img_ids, txt_ids, **_):
        x = model.x_embedder(hidden_states)
        temb = model.time_text_embed(timestep * 1000, pooled_projections)
        text = model.context_embedder(encoder_hidden_states)
        rotary = model.pos_embed(torch.cat((txt_ids, img_ids), dim=0))
        modulated, *_ = model.transformer_blocks[0].norm1(x, emb=temb)
        memory = self.memories[self.branch]
        if self.should_calc(modulated):
            before = x
            for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                text, x = block(hidden_states=x, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
            memory.residuals = (x - before,)
        else:
            x = x + memory.residuals[0]
        return (model.proj_out(model.norm_out(x, temb)),)

    def cogvideox(self, model, hidden_states, timestep, encoder_hidden_states, **_):
        frames, height, width = (hidden_states.shape[i] for i in (1, 3, 4))
        emb = model.time_embedding(model.time_proj(timestep).to(hidden_states.dtype))
        x = model.patch_embed(encoder_hidden_states, hidden_states)
        tokens = encoder_hidden_states.shape[1]
        text, x = x[:, :tokens], x[:, tokens:]
        memory = self.memories[self.branch]
        if self.should_calc(emb):
            before = x, text
            for block in model.transformer_blocks:
                x, text = block(hidden_states=x, encoder_hidden_states=text, temb=emb)
            memory.residuals = (x - before[0], text - before[1])
        else:
            x, text = x + memory.residuals[0], text + memory.residuals[1]
        x = model.proj_out(model.norm_out(model.norm_final(x), temb=emb))
        p = model.config.patch_size
        x = x.reshape(len(x), frames, height // p, width // p, -1, p, p)
        return (x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4),)


class Sequential(nn.Module):
    """Guidance by two calls of one model, as in Wan's code: even calls conditional, odd ones not."""

    def __init__(self, guided: nn.Module) -> None:
        super().__init__()
        self.one = copy.deepcopy(guided.cond)
        self.inputs, self.doubled = guided.inputs, guided.doubled

    def forward(self, *tensors: Tensor) -> Tensor:
        *own, guidance = tensors
        outputs = {}
        for k, branch in ((1, "cond"), (0, "uncond")):
            self.one.model.branch = branch
            given = zip(self.inputs, own, strict=True)
            outputs[branch] = self.one(*(t[:, k] if name in self.doubled else t for name, t in given))
        return outputs["uncond"] + guidance * (outputs["cond"] - outputs["uncond"])


def peer(kind: str, component: Component, cache: TeaCache, table: SchedulerTable, latents: Tensor, inputs=None):
    """The direct loop's run, and what it computed: {branch: bool} for each evaluation. A guided FLUX makes two calls;
    CogVideoX's pipeline batches its branches, for which the published loop knows one."""
    evaluations = len(table.timesteps)
    direct = Direct(evaluations, cache.rel_l1_thresh, cache.polynomial, cache.ret_steps, evaluations - cache.cutoff)
    if kind == "flux" and len(component.branches) == 2:
        names, args = component.inputs, component.args
        component = Component("denoiser", Sequential(component.module), names, ("sample",), args, {"": "one.model."})

    def apply(model: nn.Module, clock: peers.Clock) -> None:
        def forward(**given):
            direct.branch = getattr(model, "branch", "")
            return getattr(direct, kind)(model, **given)

        model.forward = forward

    run = peers.peer_replay(component, table, latents, apply, inputs=inputs)
    return run, [{b: c[e] for b, c in direct.computed.items()} for e in range(evaluations)]


def dynamic(component: Component, cache: TeaCache, table: SchedulerTable, latents: Tensor) -> DynamicTrace:
    layout = layout_of(component)
    return dynamic_replay(
        component, marks(cache, layout), teacache.probes(cache, layout), teacache.OnlineRule(cache, layout, table),
        lambda history: decision(cache, layout, history), table, peers.inputs_of(component), latents,
    )  # fmt: skip


def model(kind: str, guided: bool = False) -> Component:
    component = denoisers.flux(layers=1, single=1) if kind == "flux" else denoisers.cogvideox(layers=2)
    return denoisers.with_guidance(component) if guided else component


def latents_of(component: Component, seed: int) -> Tensor:
    return torch.randn(component.args[0].shape, generator=torch.Generator().manual_seed(seed))


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    scale = max(t.abs().max() for t in theirs)
    return all((a - b).abs().max() <= TOLERANCE * scale for a, b in zip(ours, theirs, strict=True))


def blocks_that_ran(run: peers.Run) -> list[bool]:
    """Whether every block ran, or none, evaluation by evaluation."""
    ran = [{s for s in sites if s.rpartition(".")[0].endswith("transformer_blocks")} for sites in run.ran]
    every = set().union(*ran)
    assert all(r in (set(), every) for r in ran)
    return [bool(r) for r in ran]


def random_table(rng: random.Random) -> tuple[str, int]:
    return rng.choice(list(TABLES)), rng.randint(5, 12)


@pytest.mark.parametrize("seed", range(8))
def test_online_decisions_and_trajectory_are_those_of_the_published_loop(seed):
    rng = random.Random(seed)
    guided = seed % 4 == 3
    scheduler, steps = random_table(rng)
    cache = TeaCache(
        rel_l1_thresh=rng.choice([0.15, 0.3, 0.6]),
        coefficients=rng.choice([(1.0, 0.0), (0.5, 0.8, 0.0)]),
        ret_steps=rng.randint(1, 3),
        cutoff=rng.randint(0, 2),
    )
    component, table = model("flux", guided), TABLES[scheduler](steps)
    latents = latents_of(component, seed)
    run, computed = peer("flux", component, cache, table, latents)
    ours = dynamic(component, cache, table, latents)
    assert ours.decisions == computed
    if not guided:
        assert blocks_that_ran(run) == [c[""] for c in computed]
    assert close([*ours.outputs, ours.latents], [*run.outputs, run.latents])


def test_a_timestep_embedding_decides_the_same_for_any_prompt_and_needs_no_calibration():
    rng = random.Random(0)
    component = model("cogvideox")
    layout = layout_of(component)
    skipped = 0
    for case in range(6):
        scheduler, steps = random_table(rng)
        cache = TeaCache(
            signal="time_embedding",
            rel_l1_thresh=rng.choice([0.02, 0.05, 0.1, 0.3]),
            coefficients=(1.0, 0.0),
            ret_steps=rng.choice([1, 2]),
            cutoff=rng.choice([0, 1]),
        )
        table = TABLES[scheduler](steps)
        exact = teacache.decide_by_timesteps(cache, component, layout, {steps: table}, timestep_scale=1.0)
        got = schedule(cache, layout, Trajectory(table.timesteps), exact)
        inputs = {n: (1 + case) * torch.randn_like(t) for n, t in peers.inputs_of(component).items()}
        latents = latents_of(component, case)
        run, computed = peer("cogvideox", component, cache, table, latents, inputs)
        assert [{"": not d.actions} for d in got.decisions] == computed
        skipped += sum(bool(d.actions) for d in got.decisions)
        if not any(d.actions for d in got.decisions):
            continue
        planned = make_plans(cache, layout, {steps: table}, exact)
        ours = peers.ours(component, planned, planned.plans[0], latents, inputs=inputs)
        assert close([*ours.outputs, ours.latents], [*run.outputs, run.latents])
    assert skipped > 10


@pytest.mark.slow
@pytest.mark.compiles
def test_an_exact_plan_compiles_and_both_branches_skip():
    cache = TeaCache(signal="time_embedding", rel_l1_thresh=0.6, coefficients=(1.0, 0.0))
    component, table = model("cogvideox", guided=True), TABLES["ddim"](8)
    layout = layout_of(component)
    planned = make_plans(
        cache,
        layout,
        {8: table},
        teacache.decide_by_timesteps(cache, component, layout, {8: table}, timestep_scale=1.0),
    )
    latents = latents_of(component, 0)
    run, computed = peer("cogvideox", component, cache, table, latents)
    assert [e.variant == "full" for e in planned.plans[0].evaluations] == [c[""] for c in computed]
    eager = peers.ours(component, planned, planned.plans[0], latents)
    assert close([*eager.outputs, eager.latents], [*run.outputs, run.latents])
    uncached = peers.ours(component, planned, planned.plans[1], latents)
    plain = peers.peer_replay(component, table, latents, lambda model, clock: None)
    assert close(uncached.outputs, plain.outputs)
    assert not close(eager.outputs, plain.outputs)
    artifact = compiled_run("cogvideox", component, planned, planned.plans[0], latents)
    # the compiler adds in another order; a wrong site or coefficient is off by 1e-2
    assert artifact.error(eager) < 2e-5


def test_a_frozen_plan_computes_where_most_runs_did():
    cache = TeaCache(rel_l1_thresh=0.3, coefficients=(1.0, 0.0))
    component, table = model("flux"), TABLES["flow"](10)
    layout = layout_of(component)
    runs = []
    for seed in range(3):
        latents = (1 + seed) * latents_of(component, seed)
        runs.append(peer("flux", component, cache, table, latents)[1])
    shares = tuple(sum(run[e][""] for run in runs) / 3 for e in range(10))
    assert set(shares) - {0.0, 1.0}  # so that there was something to vote on
    made = Calibration(
        model="tiny", sha256="0" * 64, scheduler=table.scheduler, steps=10, timesteps=table.timesteps,
        guidance_scale=1.0, prompts=3, prompts_sha256="0" * 64, seeds=1,
        decisions={"teacache": DecisionShares(parameters=decision_parameters(cache), computed={"": shares})},
    )  # fmt: skip
    got = schedule(cache, layout, Trajectory(table.timesteps), made)
    assert [not d.actions for d in got.decisions] == [sum(run[e][""] for run in runs) >= 2 for e in range(10)]


def test_the_comparison_can_fail():
    cache = TeaCache(rel_l1_thresh=0.3, coefficients=(1.0, 0.0))
    component, table = model("flux"), TABLES["flow"](10)
    latents = latents_of(component, 0)
    run, _ = peer("flux", component, cache, table, latents)
    for other in ({"rel_l1_thresh": 0.6}, {"ret_steps": 5}, {"coefficients": (2.0, 0.0)}):
        ours = dynamic(component, cache.model_copy(update=other), table, latents)
        assert not close(ours.outputs, run.outputs)


def test_a_signal_that_depends_on_the_prompt_is_not_exact():
    cache = TeaCache(signal="time_embedding", module="time_text_embed")
    component, table = model("flux"), TABLES["flow"](6)
    with pytest.raises(ExportError, match=r"time_text_embed': .* depends on more than the timestep"):
        teacache.decide_by_timesteps(cache, component, layout_of(component), {6: table}, timestep_scale=1.0)
    alone = cache.model_copy(update={"module": "time_text_embed.timestep_embedder"})
    made = teacache.decide_by_timesteps(alone, component, layout_of(component), {6: table}, timestep_scale=1.0)
    assert len(made.computed[table.timesteps]) == 6


def test_a_module_that_does_not_exist_is_refused_with_those_that_do():
    cache = TeaCache(signal="time_embedding")
    component, table = model("flux"), TABLES["flow"](6)
    with pytest.raises(ExportError, match=r"time_embedding' is not in the model; .*time_text_embed"):
        teacache.decide_by_timesteps(cache, component, layout_of(component), {6: table}, timestep_scale=1.0)


def test_a_model_without_blocks_is_refused_before_its_signal_is_looked_for():
    unet, table = denoisers.sd_unet(), TABLES["ddim"](6)
    with pytest.raises(ExportError, match=r"transformer blocks, and this model has none"):
        teacache.decide_by_timesteps(
            TeaCache(signal="time_embedding"), unet, layout_of(unet), {6: table}, timestep_scale=1.0
        )


def test_decisions_come_from_a_calibration_or_from_the_weights():
    layout, table = layout_of(model("flux")), TABLES["flow"](6)
    with pytest.raises(ExportError, match=r"'teacache' needs a calibration"):
        schedule(TeaCache(), layout, Trajectory(table.timesteps), None)
    with pytest.raises(ExportError, match=r"export again with these steps"):
        schedule(TeaCache(signal="time_embedding"), layout, Trajectory(table.timesteps), ExactDecisions({}))
    with pytest.raises(ExportError, match=r"transformer blocks, and this model has none"):
        marks(TeaCache(), layout_of(denoisers.sd_unet()))


def test_polynomials_are_numbers_or_names():
    assert (
        TeaCache().polynomial == POLYNOMIALS["flux"] == (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
    )
    assert TeaCache(coefficients=[1.0, 0.0]).polynomial == (1.0, 0.0)
    with pytest.raises(ValidationError, match=r"is called 'fluxx'; .*one of flux, "):
        TeaCache(coefficients="fluxx")
    rng = random.Random(3)
    for coefficients in POLYNOMIALS.values():
        x = rng.uniform(0, 0.3)
        assert teacache.evaluate_polynomial(coefficients, x) == pytest.approx(np.poly1d(coefficients)(x), rel=1e-12)
