"""Predicted times: every distinct call is timed once, and what is predicted adds up and grows with the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prebake.exporter.cost import machine_rates as speed
from prebake.exporter.cost.count import Census, FusedLoop, HeavyCall, Operand, take_census
from prebake.exporter.cost.forecast import assign_signs
from prebake.exporter.cost.machine_rates import (
    COLD_BYTES,
    MIN_TIMED_RUNS,
    PROBE_FLOPS,
    MachineRates,
    count_copies,
    reduce_rows,
    time_call,
)
from prebake.runtime.text import VARIANT_SIGNS

LINEAR = torch.ops.aten.linear.default


def operand(*shape: int, constant: bool = False, dtype: torch.dtype = torch.float32) -> Operand:
    return Operand(shape, torch.empty(shape, device="meta").stride(), dtype, constant)


def linear(rows: int, inner: int = 64, outer: int = 64) -> HeavyCall:
    return HeavyCall(
        LINEAR, (operand(1, rows, inner), operand(outer, inner, constant=True)), (), 2 * rows * inner * outer
    )


def attention(heads: int, tokens: int, width: int = 64) -> HeavyCall:
    q = operand(1, heads, tokens, width)
    op = torch.ops.aten.scaled_dot_product_attention.default
    return HeavyCall(op, (q, q, q), (("is_causal", False),), 4 * heads * tokens * tokens * width)


@pytest.fixture
def clockwork(monkeypatch):
    """Rates that do not depend on the machine: a million FLOPs or bytes in a millisecond. `asked` is what was timed."""
    asked: list[HeavyCall] = []

    def time_of(call: HeavyCall, copies: int, stand_in: Any) -> float:
        asked.append(call)
        rows = call.operands[0].shape[-2]
        return 2 * rows * 64 * 64 / 1e6

    monkeypatch.setattr(speed, "time_call", time_of)
    monkeypatch.setattr(MachineRates, "bandwidth", lambda self, moved: 1e6)
    monkeypatch.setattr(MachineRates, "value_ms", lambda self: 1e-6)
    monkeypatch.setattr(MachineRates, "call_ms", lambda self: 1e-3)
    return asked


def test_every_distinct_call_is_timed_once(clockwork):
    rates = MachineRates()
    work = Census({linear(8): 3, linear(16): 1}, ())
    rates.forecast(work, 0)
    rates.forecast(work, 0)
    assert clockwork == [linear(8), linear(16)]


def test_times_add_up(clockwork):
    rates = MachineRates()
    one, other = (
        Census({linear(8): 3}, (FusedLoop(800, 800, 400),)),
        Census({linear(16): 1}, (FusedLoop(80, 80, 40),) * 2),
    )
    both = Census({**one.heavy, **other.heavy}, one.loops + other.loops)
    assert rates.forecast(both, 0).ms == pytest.approx(rates.forecast(one, 0).ms + rates.forecast(other, 0).ms)
    assert rates.forecast(one, 0).heavy_ms == {"matmul float32": pytest.approx(3 * 2 * 8 * 64 * 64 / 1e6)}


def test_variants_beyond_the_alphabet_share_a_sign():
    names = [f"v{i}" for i in range(40)]
    letters = assign_signs(names)
    assert list(letters) == names
    assert "".join(letters.values()) == VARIANT_SIGNS + "?" * 12


def test_more_work_takes_longer(clockwork):
    rates = MachineRates()
    assert rates.heavy_ms(linear(8), 0) < rates.heavy_ms(linear(9), 0)
    assert rates.loop_ms(FusedLoop(1 << 20, 1 << 20, 1 << 18)) < rates.loop_ms(FusedLoop(1 << 20, 1 << 21, 1 << 18))
    assert rates.loop_ms(FusedLoop(1 << 20, 1 << 20, 1 << 18)) < rates.loop_ms(FusedLoop(1 << 20, 1 << 20, 1 << 24))


def test_the_machines_own_rates_are_measured_once(monkeypatch):
    asked: list[int] = []

    def timed(run, copies: int) -> float:
        run(0)
        asked.append(copies)
        return 0.5

    monkeypatch.setattr(speed, "time_runs", timed)
    rates = MachineRates()
    first = [rates.loop_ms(FusedLoop(1000, 1000, 500)) for _ in range(3)]
    assert len(set(first)) == 1
    assert len(asked) == 3  # bandwidth, a value, a call
    assert rates.bandwidth(1 << 40) == rates.bandwidth(COLD_BYTES)


@pytest.mark.parametrize("call", [linear(10_000, 2048, 4096), attention(64, 1024)])
def test_a_long_call_is_timed_on_a_part_of_it(call):
    part, times = reduce_rows(call)
    assert times > 1
    length = {True: 1, False: -2}[call.kind == "attention"]
    assert part.operands[0].shape[length] * times == pytest.approx(call.operands[0].shape[length])
    assert call.flops / times <= PROBE_FLOPS
    assert time_call(part, 1) > 0  # the shapes still fit together


def test_what_a_backend_calls_instead_is_what_is_timed():
    asked, ran = [], []

    def stand_in(op, arguments, keywords):
        asked.append((op, [tuple(a.shape) for a in arguments]))
        return (lambda: ran.append(torch.ones(1 << 18).exp())) if op is not LINEAR else None

    assert time_call(attention(1, 8), 1, stand_in) > 0
    assert len(ran) > MIN_TIMED_RUNS
    count = len(ran)
    assert time_call(linear(8), 1, stand_in) > 0
    assert len(ran) == count
    assert asked == [(attention(1, 8).op, [(1, 1, 8, 64)] * 3), (LINEAR, [(1, 8, 64), (64, 64)])]


def test_a_short_call_is_timed_as_it_is():
    assert reduce_rows(linear(80)) == (linear(80), 1.0)


def test_weights_are_as_cold_as_in_the_graph():
    row = HeavyCall(LINEAR, (operand(1, 1, 512), operand(512, 512, constant=True)), (), 2 * 512 * 512)
    weights = 4 * 512 * 512
    assert count_copies(row, 10 * weights) == 10
    assert count_copies(row, 1 << 40) == COLD_BYTES // weights
    assert count_copies(row, 0) == 1
    assert count_copies(linear(10_000, 2048, 4096), 1 << 40) == 1  # bound by arithmetic wherever its weights lie


def test_real_kernels_predict_that_skipping_attention_is_cheaper(tiny_pipe):
    from prebake.exporter.capture.variants import capture_variants
    from prebake.exporter.families import flux
    from prebake.exporter.plan import PlanSet
    from prebake.exporter.progress import open_progress
    from prebake.exporter.sites.discover import discover_layout
    from prebake.exporter.sites.marks import Variant

    denoiser = flux.denoiser(tiny_pipe, flux.Size(32, 32, 8))
    marks = tuple(a.mark() for a in discover_layout(denoiser).attentions)
    variants = (Variant("full", ()), Variant("reuse", tuple((m.name, "combine") for m in marks)))
    _, graphs = capture_variants(denoiser, PlanSet(marks, variants, ()), open_progress("quiet"))
    rates = MachineRates()
    full, reuse = (rates.forecast(take_census(g), 1 << 20) for g in graphs)
    assert 0 < reuse.ms < full.ms
    assert set(full.heavy_ms) - set(reuse.heavy_ms) == {"attention float32"}
