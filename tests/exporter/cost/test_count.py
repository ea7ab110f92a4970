"""Costs are counted on the pruned graph, and a variant must skip what its plan promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.capture.variants import capture_variants
from prebake.exporter.cost.count import (
    check_skips,
    count_attention_ops,
    count_cost,
    module_flops,
    plan_share,
    take_census,
)
from prebake.exporter.cost.variants import check_variant_costs
from prebake.exporter.families import flux
from prebake.exporter.load.source import load_model
from prebake.exporter.lower import w8a8
from prebake.exporter.plan import PlanSet
from prebake.exporter.progress import open_progress
from prebake.exporter.quantize import Int8Dynamic
from prebake.exporter.sites.marks import Variant
from prebake.runtime.errors import ExportError
from prebake.runtime.manifest import Cost
from prebake.runtime.plan import Evaluation, Plan, Update
from support.known_layouts import layout_of

SIZE = flux.Size(32, 32, 8)


class Small(nn.Module):
    """One Linear, one int8 product and one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 16), nn.Conv2d(1, 2, 3, bias=False)
        self.codes = nn.Buffer(torch.ones(16, 32, dtype=torch.int8))

    def forward(self, x):
        y = self.linear(x)
        product = torch._int_mm(y.to(torch.int8), self.codes)
        return (product.float().sum() + self.conv(x[None, None]).sum(),)


def test_flops_ops_and_constants_of_a_graph_counted_by_hand():
    got = count_cost(capture_graph("g", Small(), (torch.ones(32, 8),), ("x",), ("y",)))
    linear, product, conv = 32 * 8 * 16, 32 * 16 * 32, 30 * 6 * 2 * 9
    assert got.flops == 2 * (linear + product + conv)
    assert got.flops_by_class == {
        "convolution float32": 2 * conv,
        "matmul float32": 2 * linear,
        "matmul int8": 2 * product,
    }
    # y as float32 and as int8, the int32 product, the convolution's output, its sum (twice), the result
    assert got.moved_bytes == 32 * 16 * (4 + 1) + 32 * 32 * 4 + 2 * 30 * 6 * 4 + 3 * 4
    assert got.constants == 4
    assert got.constants_bytes == 4 * (8 * 16 + 16 + 2 * 9) + 16 * 32
    # linear, to, int_mm, to, sum, two unsqueezes, conv, sum, add; the assertions that `to` brings are pruned
    assert got.ops == 10


def test_an_int8_convolution_costs_what_it_replaces():
    def counted(*int8: str) -> dict[str, int]:
        module = nn.Sequential(nn.Conv2d(8, 24, 3, stride=2, padding=1), nn.Flatten())
        w8a8.replace_layers(module, set(int8), Int8Dynamic())
        return count_cost(capture_graph("g", module, (torch.ones(2, 8, 13, 10),), ("x",), ("y",))).flops_by_class

    assert counted("0") == {"convolution int8": counted()["convolution float32"]}


@pytest.fixture(scope="module")
def reused(tiny_folder):
    """The tiny denoiser, its plan with every attention reused, and the graphs `full` and `reuse`; nobody changes them."""
    pipe = load_model(str(tiny_folder), None, {"default": torch.float32}).pipe
    marks = tuple(a.mark() for a in layout_of(flux.denoiser(pipe, SIZE)).attentions)
    everything, some = tuple((m.name, "compute") for m in marks), tuple((m.name, "combine") for m in marks)
    planned = PlanSet(marks, (Variant("full", everything), Variant("reuse", some)), ())
    denoiser = flux.denoiser(pipe, SIZE)
    return denoiser, *capture_variants(denoiser, planned, open_progress("quiet"))


def test_an_attention_reuse_variant_has_no_attention_left(reused):
    denoiser, planned, (full, reuse) = reused
    assert (count_attention_ops(full), count_attention_ops(reuse)) == (3, 0)
    costs = {"full": count_cost(full), "reuse": count_cost(reuse)}
    inside = module_flops(denoiser.module, denoiser.args)
    skipped = sum(inside[m.modules[0]] for m in planned.marks)
    assert skipped > 0
    assert costs["reuse"].flops == costs["full"].flops - skipped
    check_variant_costs(denoiser, planned, costs)


def test_a_reuse_variant_leaves_the_attentions_weights_behind(reused):
    _, _, (full, reuse) = reused
    assert any(".attn." in name for name in full.constants())
    assert not any(".attn." in name for name in reuse.constants())
    assert count_cost(reuse).constants_bytes < count_cost(full).constants_bytes


def test_the_modules_flops_add_up_to_the_graphs(reused):
    """What is promised and what is counted are measured in the same unit, before and after capture."""
    denoiser, _, (full, _) = reused
    assert module_flops(denoiser.module, denoiser.args)["transformer"] == count_cost(full).flops


def test_a_variant_that_skips_nothing_is_refused(reused):
    denoiser, planned, (full, _) = reused
    costs = {"full": count_cost(full), "reuse": count_cost(full)}
    with pytest.raises(
        ExportError,
        match=r"variant 'reuse' skips nothing: .*its sites feed values",
    ):
        check_variant_costs(denoiser, planned, costs)


def test_attention_is_counted(reused):
    """torch's own counter passes over the CPU's attention."""
    _, _, (full, reuse) = reused
    tokens, heads, width = 64 + 8, 2, 32  # of the picture and of the text
    assert count_cost(full).flops_by_class["attention float32"] == 3 * 4 * heads * tokens * tokens * width
    assert "attention float32" not in count_cost(reuse).flops_by_class
    assert sum(count_cost(full).flops_by_class.values()) == count_cost(full).flops


def test_a_variant_does_less_of_every_kind_of_work(reused):
    _, _, graphs = reused
    full, reuse = map(take_census, graphs)
    assert reuse.moved_bytes < full.moved_bytes
    assert sum(reuse.heavy.values()) < sum(full.heavy.values())
    assert sum(loop.values for loop in reuse.loops) < sum(loop.values for loop in full.loops)


def test_a_plans_share_is_the_mean_of_its_evaluations():
    update = Update(latents=(1.0,), outputs=(0.0,))
    calls = tuple(
        Evaluation(step=i, variant=v, timestep=1.0, update=update) for i, v in enumerate(("full", "a", "a", "b"))
    )
    plan = Plan(name="4", steps=4, scheduler="x", evaluations=calls)
    assert plan_share(plan, {"full": 1.0, "a": 0.5, "b": 0.2}) == pytest.approx(0.55)


def of(flops: int) -> Cost:
    return Cost(flops=flops, ops=1, constants=0, constants_bytes=0)


def test_a_variant_dearer_than_promised_is_refused():
    with pytest.raises(
        ExportError,
        match=r"'reuse' should cost 6,000 FLOPs .*graph has 6,101;",
    ):
        check_skips(of(10_000), of(6_101), "reuse", 4_000)


def test_one_percent_is_allowed_and_cheaper_is_fine():
    check_skips(of(10_000), of(6_100), "reuse", 4_000)
    check_skips(of(10_000), of(5_000), "reuse", 4_000)


def test_a_value_that_no_variant_reads_is_not_stored(tiny_pipe):
    """Nothing after the last block reads its text."""
    denoiser, layout = flux.denoiser(tiny_pipe, SIZE), layout_of(flux.denoiser(tiny_pipe, SIZE))
    mark = layout.residual("", len(layout.blocks("")) - 1, len(layout.blocks("")), "tail")
    marked = PlanSet((mark,), (Variant("full", (("tail", "compute"),)), Variant("reuse", (("tail", "combine"),))), ())
    planned, (full, reuse) = capture_variants(denoiser, marked, open_progress("quiet"))
    assert mark.tensors == ("tail:0", "tail:1")
    assert planned.marks[0].tensors == ("tail:1",)
    assert [s.name for s in full.outputs] == ["sample", "tail:1"]
    assert [s.name for s in reuse.inputs][-2:] == ["coefficients", "tail:1@0"]
