"""Costs are counted on the pruned graph, and a variant must skip what its plan promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prebake.exporter.capture import capture
from prebake.exporter.cost import attention_ops, check_skips, cost, module_flops
from prebake.exporter.discover import discover
from prebake.exporter.families import flux
from prebake.exporter.marks import Variant
from prebake.exporter.pipeline import capture_variants, check_variants
from prebake.exporter.plan import Planned
from prebake.exporter.progress import progress
from prebake.exporter.source import load
from prebake.runtime.errors import ExportError
from prebake.runtime.manifest import Cost

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
    got = cost(capture("g", Small(), (torch.ones(32, 8),), ("x",), ("y",)))
    linear, product, conv = 32 * 8 * 16, 32 * 16 * 32, 30 * 6 * 2 * 9
    assert got.flops == 2 * (linear + product + conv)
    assert got.constants == 4
    assert got.constants_bytes == 4 * (8 * 16 + 16 + 2 * 9) + 16 * 32
    # linear, to, int_mm, to, sum, two unsqueezes, conv, sum, add; the assertions that `to` brings are pruned
    assert got.ops == 10


@pytest.fixture(scope="module")
def reused(tiny_folder):
    """The tiny denoiser, its plan with every attention reused, and the graphs `full` and `reuse`; nobody changes them."""
    pipe = load(str(tiny_folder), None, {"default": torch.float32}).pipe
    marks = tuple(a.mark() for a in discover(flux.denoiser(pipe, SIZE)).attentions)
    everything, some = tuple((m.name, "compute") for m in marks), tuple((m.name, "combine") for m in marks)
    planned = Planned(marks, (Variant("full", everything), Variant("reuse", some)), ())
    denoiser = flux.denoiser(pipe, SIZE)
    return denoiser, *capture_variants(denoiser, planned, progress("quiet"))


def test_an_attention_reuse_variant_has_no_attention_left(reused):
    denoiser, planned, (full, reuse) = reused
    assert (attention_ops(full), attention_ops(reuse)) == (3, 0)
    costs = {"full": cost(full), "reuse": cost(reuse)}
    inside = module_flops(denoiser.module, denoiser.args)
    skipped = sum(inside[m.modules[0]] for m in planned.marks)
    assert skipped > 0
    assert costs["reuse"].flops == costs["full"].flops - skipped
    check_variants(denoiser, planned, costs)


def test_a_reuse_variant_leaves_the_attentions_weights_behind(reused):
    _, _, (full, reuse) = reused
    assert any(".attn." in name for name in full.constants())
    assert not any(".attn." in name for name in reuse.constants())
    assert cost(reuse).constants_bytes < cost(full).constants_bytes


def test_the_modules_flops_add_up_to_the_graphs(reused):
    """What is promised and what is counted are measured in the same unit, before and after capture."""
    denoiser, _, (full, _) = reused
    assert module_flops(denoiser.module, denoiser.args)["transformer"] == cost(full).flops


def test_a_variant_that_skips_nothing_is_refused(reused):
    denoiser, planned, (full, _) = reused
    costs = {"full": cost(full), "reuse": cost(full)}
    with pytest.raises(
        ExportError,
        match=r"variant 'reuse' skips nothing: [\d,]+ FLOPs, the full graph has [\d,]+; its sites feed values that are computed anyway",
    ):
        check_variants(denoiser, planned, costs)


def of(flops: int) -> Cost:
    return Cost(flops=flops, ops=1, constants=0, constants_bytes=0)


def test_a_variant_dearer_than_promised_is_refused():
    with pytest.raises(
        ExportError,
        match=r"variant 'reuse' should cost 6,000 FLOPs after skipping its sites, its graph has 6,101; something outside the sites reads",
    ):
        check_skips(of(10_000), of(6_101), "reuse", 4_000)


def test_one_percent_is_allowed_and_cheaper_is_fine():
    check_skips(of(10_000), of(6_100), "reuse", 4_000)
    check_skips(of(10_000), of(5_000), "reuse", 4_000)


def test_a_value_that_no_variant_reads_is_not_stored(tiny_pipe):
    """Nothing after the last block reads its text."""
    denoiser, layout = flux.denoiser(tiny_pipe, SIZE), discover(flux.denoiser(tiny_pipe, SIZE))
    mark = layout.residual("", len(layout.blocks("")) - 1, len(layout.blocks("")), "tail")
    marked = Planned((mark,), (Variant("full", (("tail", "compute"),)), Variant("reuse", (("tail", "combine"),))), ())
    planned, (full, reuse) = capture_variants(denoiser, marked, progress("quiet"))
    assert mark.tensors == ("tail:0", "tail:1")
    assert planned.marks[0].tensors == ("tail:1",)
    assert [s.name for s in full.outputs] == ["sample", "tail:1"]
    assert [s.name for s in reuse.inputs][-2:] == ["coefficients", "tail:1@0"]
