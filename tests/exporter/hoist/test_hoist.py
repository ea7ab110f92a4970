"""Hoisting: prologue, step and body compute what the whole graph does, of every family; what they cost adds up to it; and nothing that
depends on the latents leaves the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from prebake.exporter.bench.compiled_variants import VariantCompiler, call_by_name
from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.capture.variants import capture_variants
from prebake.exporter.cost.count import count_cost
from prebake.exporter.hoist.cut import choose_values, count_flops
from prebake.exporter.hoist.hoist import HoistedGraphs, hoist_graphs
from prebake.exporter.hoist.values import Level, ValueTable
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.plan import PlanSet
from prebake.exporter.private_torch import graph_specs
from prebake.exporter.progress import open_progress
from prebake.exporter.sites.component import Component
from prebake.exporter.sites.discover import discover_layout
from prebake.exporter.sites.guidance import add_guidance
from prebake.exporter.sites.marks import Variant
from prebake.exporter.verify.closeness import relative_error
from support.tiny_denoisers import DITS, sd_unet, sdxl_unet

EVALUATIONS = 3
SMALL_UNET = {"block_out_channels": (8, 16), "layers_per_block": 1}
FAMILIES = {
    **DITS,
    "sd": partial(
        sd_unet,
        **SMALL_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "sdxl": partial(
        sdxl_unet,
        **SMALL_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
    ),
}
CASES = ["flux", "sd batched", "sdxl sequential", "sd3 sequential", "pixart batched", "cogvideox sequential"]


class HoistCase(NamedTuple):
    """The variants `full` and `reuse` of a tiny denoiser, whose attentions are all reused in the second, before and after."""

    denoiser: Component
    before: tuple[CapturedGraph, ...]
    after: HoistedGraphs


@pytest.fixture(scope="module", params=CASES)
def hoist_case(request) -> HoistCase:
    family, _, guidance = request.param.partition(" ")
    denoiser = FAMILIES[family]()
    if guidance:
        doubled = tuple(n for n in denoiser.inputs if n not in ("hidden_states", "timestep", "time_ids"))
        denoiser = add_guidance(denoiser, doubled, batched=guidance == "batched", rescale=True)
    # in float64: in float32 products of more rows round elsewhere, by 1e-6 and, of what guidance amplifies, more
    denoiser = replace(denoiser, module=denoiser.module.double(), args=tuple(t.double() for t in denoiser.args))
    marks = tuple(a.mark() for a in discover_layout(denoiser).attentions)
    everything, some = (tuple((m.name, action) for m in marks) for action in ("compute", "combine"))
    planned = PlanSet(marks, (Variant("full", everything), Variant("reuse", some)), ())
    _, graphs = capture_variants(denoiser, planned, open_progress("quiet"))
    return HoistCase(denoiser, graphs, hoist_graphs(graphs, EVALUATIONS))


def run(graph: CapturedGraph, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        flat = graph.gm(*(given[s.name] for s in graph.inputs))
    return dict(zip((s.name for s in graph.outputs), flat, strict=True))


def test_prologue_step_and_body_compute_what_the_whole_graph_does(hoist_case):
    after = hoist_case.after
    for whole, body in zip(hoist_case.before, after.variants, strict=True):
        given = {s.name: t for s, t in zip(whole.inputs, whole.args, strict=True)}
        given["timestep"] = given["timestep"] * 0.7
        timesteps = torch.stack([given["timestep"] * (1 - e / 4) for e in range(EVALUATIONS)])
        once = run(after.prologue, given) if after.prologue else {}
        rows = run(after.step, {**given, **once, "timestep": timesteps})
        for e in range(EVALUATIONS):
            now = {**given, "timestep": timesteps[e]}
            got = run(body, {**now, **once, **{name: t[e] for name, t in rows.items()}})
            expected = run(whole, now)
            assert got.keys() == expected.keys()
            assert max(relative_error(got[name], expected[name]) for name in got) <= 1e-12


def test_weights_leave_the_loop_and_keep_their_names(hoist_case):
    after = hoist_case.after
    whole = {n: t for g in hoist_case.before for n, t in g.constants().items()}
    outside = {n: t for g in (after.prologue, after.step) if g for n, t in g.constants().items()}
    inside = {n: t for g in after.variants for n, t in g.constants().items()}
    assert all(whole[name] is tensor or "folded" in name for name, tensor in outside.items())
    weights = [n for n in outside if n.endswith("weight") and whole[n].dim() > 1]
    assert weights
    assert not inside.keys() & set(weights)
    assert {n for n in whole if n.endswith("weight")} <= inside.keys() | outside.keys()


def test_flops_add_up_to_the_whole(hoist_case):
    """But for what two branches of guidance had in common, and now share."""
    after, whole = hoist_case.after, count_cost(hoist_case.before[0]).flops
    prologue, step, body = (count_cost(g).flops if g else 0 for g in (after.prologue, after.step, after.variants[0]))
    assert step % EVALUATIONS == 0
    total = prologue + step // EVALUATIONS + body
    assert prologue + step > 0
    assert total <= whole
    if hoist_case.denoiser.module.__class__.__name__ != "GuidedDenoiser":
        assert total == whole


def test_both_variants_take_the_same_values(hoist_case):
    full, reuse = (
        {s.name for s in g.inputs if s.name.startswith(("prologue:", "step:"))} for g in hoist_case.after.variants
    )
    assert reuse <= full
    assert {s.name for g in (hoist_case.after.prologue, hoist_case.after.step) if g for s in g.outputs} >= full


def test_nothing_of_the_latents_is_computed_before_the_loop(hoist_case):
    after = hoist_case.after
    names = {s.name for g in (after.prologue, after.step) if g for s in g.inputs}
    assert not {n for n in names if n in ("hidden_states", "coefficients") or n.startswith("guidance") or "@" in n}
    if after.prologue:
        assert "timestep" not in {s.name for s in after.prologue.inputs}


class Toy(nn.Module):
    """Cross attention's key by the text, modulation by the step, and products that must stay: of the latents, and of a text that is made
    larger by it."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.widen, self.time, self.proj = (nn.Linear(8, n, bias=False) for n in (8, 8192, 8, 8))

    def forward(self, hidden_states, timestep, text):
        wave = torch.sin(timestep[:, None] * torch.arange(8.0))
        wide = self.widen(text.double().float()).mean(-1, keepdim=True)
        return (
            self.proj(hidden_states) * self.time(wave)[:, None] + self.key(text.transpose(1, 2).contiguous()) + wide,
        )


def toy() -> CapturedGraph:
    args = torch.randn(1, 8, 8), torch.tensor([3.0]), torch.randn(1, 8, 8)
    return capture_graph("full", Toy(), args, ("hidden_states", "timestep", "text"), ("sample",))


def test_what_is_passed_is_small_beside_what_is_saved():
    """The mean of a wide product is passed, not the product; no input is passed in another form."""
    after = hoist_graphs((toy(),), EVALUATIONS)
    assert after.prologue is not None
    assert after.step is not None
    assert sorted(tuple(s.shape) for s in after.prologue.outputs) == [(1, 8, 1), (1, 8, 8)]
    assert [(s.name, tuple(s.shape)) for s in after.step.outputs] == [("step:0", (EVALUATIONS, 1, 8))]
    assert sorted(after.variants[0].constants()) == ["proj.weight"]


@pytest.mark.slow  # the graphs as captured are compared at every run
def test_compiled_they_compute_what_the_whole_graph_does():
    compiler, whole = VariantCompiler(), toy()
    after = hoist_graphs((whole,), EVALUATIONS)

    def compiled(graph: CapturedGraph | None, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert graph is not None
        return call_by_name(compiler.model(graph), graph)(given)

    given = {s.name: t for s, t in zip(whole.inputs, whole.args, strict=True)}
    timesteps = torch.tensor([[3.0], [2.0], [1.0]])
    once = compiled(after.prologue, given)
    rows = compiled(after.step, {"timestep": timesteps, **once})
    for e, timestep in enumerate(timesteps):
        now = {**given, "timestep": timestep}
        got = compiled(after.variants[0], {**now, **once, **{name: t[e] for name, t in rows.items()}})
        assert relative_error(got["sample"], run(whole, now)["sample"]) <= 1e-6


def test_a_hoisted_graph_says_nothing_of_the_inputs_that_it_was_traced_with():
    """AOTInductor would flatten its inputs by them."""
    (body,) = hoist_graphs((toy(),), EVALUATIONS).variants
    assert graph_specs(body.gm) == (None, None)
    assert graph_specs(toy().gm) != (None, None)


def test_latents_that_were_taken_for_text_would_be_seen(monkeypatch):
    """The canary of the parity: a pass that knows the latents' name wrongly hoists their product, and the picture stands still."""
    monkeypatch.setattr("prebake.exporter.hoist.values.LOOP_INPUTS", ())
    after = hoist_graphs((toy(),), EVALUATIONS)
    assert after.prologue is not None
    assert "hidden_states" in {s.name for s in after.prologue.inputs}


def test_a_graph_with_nothing_to_hoist_stays_as_it_is():
    class Plain(nn.Module):
        def forward(self, hidden_states, timestep, text):
            return (hidden_states * timestep + text.float().expand(1, 8, 8),)

    args = torch.randn(1, 8, 8), torch.tensor([3.0]), torch.randn(1, 1, 8)
    graph = capture_graph("full", Plain(), args, ("hidden_states", "timestep", "text"), ("sample",))
    assert hoist_graphs((graph,), EVALUATIONS) == HoistedGraphs((graph,))


def test_equal_tables_of_two_variants_are_one_value():
    """Each capture folds tables of its own, in memory of its own."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, hidden_states, timestep, text):
            return (hidden_states + self.out(text * torch.arange(8.0).cos()),)

    args = torch.randn(1, 8, 8), torch.tensor([3.0]), torch.randn(1, 8, 8)
    module, names = Turned(), ("hidden_states", "timestep", "text")
    graphs = [capture_graph(name, module, args, names, ("sample",)) for name in ("full", "reuse")]
    table = ValueTable(graphs)
    assert len(choose_values(table, Level.PROMPT, count_flops(table), EVALUATIONS)) == 1
