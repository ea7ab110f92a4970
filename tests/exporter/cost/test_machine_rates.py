"""Predicted times: rates of the machine are measured once, on a grid, and what is predicted adds up and grows with the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prebake.exporter.cost import machine_rates, rate_grid, timing
from prebake.exporter.cost.count import Census, FusedLoop, HeavyCall, Operand, take_census
from prebake.exporter.cost.forecast import assign_signs, describe_machine
from prebake.exporter.cost.machine_rates import COLD_BYTES, MachineRates, measure_rates
from prebake.exporter.cost.rate_grid import GridKind
from prebake.exporter.cost.timing import MIN_TIMED_RUNS, PROBE_FLOPS, reduce_rows, time_call, time_runs
from prebake.exporter.lower import load_backend, w8a8
from prebake.exporter.progress import Progress
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime.rates.rates_file import Machine, list_rates, rates_path, read_rates
from prebake.runtime.text import VARIANT_SIGNS

LINEAR = torch.ops.aten.linear.default
THIS = Machine(cpu="a", flags="f", threads=1, torch="2", kernels="", backend="aoti", isa="host")
SMALL_AXES = {
    "matmul": {"rows": (1, 64), "inner": (16, 256), "outer": (16, 256)},
    "convolution": {"pixels": (16, 64), "inner": (4, 16), "outer": (4, 16)},
    "attention": {"queries": (8, 64), "keys": (8, 64), "width": (16, 32)},
}


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


def convolution(channels: int, side: int, kernel: int = 3, groups: int = 1) -> HeavyCall:
    x, weight = operand(1, channels, side, side), operand(channels, channels // groups, kernel, kernel, constant=True)
    op, flops = torch.ops.aten.conv2d.default, 2 * channels * channels // groups * (side * kernel) ** 2
    return HeavyCall(op, (x, weight, None, (1, 1), (kernel // 2, kernel // 2), (1, 1), groups), (), flops)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No rates of earlier processes, and none left for later ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def clockwork(monkeypatch) -> list[HeavyCall]:
    """Rates that do not depend on the machine: 50 MFLOP or a million bytes in a millisecond. What was timed, in order."""
    asked: list[HeavyCall] = []

    def time_of(call: HeavyCall, stand_in: Any = None) -> float:
        asked.append(call)
        return call.flops / 5e7

    monkeypatch.setattr(machine_rates, "time_call", time_of)
    monkeypatch.setattr(machine_rates, "time_runs", lambda run: 1e-3)
    monkeypatch.setattr(MachineRates, "bandwidth", lambda self, moved: 1e6)
    monkeypatch.setattr(MachineRates, "value_ms", lambda self: 1e-6)
    return asked


# --- what is measured, and when -------------------------------------------------------------------------------------------


def test_a_graph_of_other_shapes_needs_no_measurement(clockwork):
    """The time of a forecast does not grow with the shapes of a model."""
    rates = MachineRates(THIS)
    rates.forecast(Census({linear(8): 3, attention(1, 80): 1, convolution(32, 9): 1}, ()), 0)
    count = len(clockwork)
    assert 0 < count <= 64 + 72 + 48
    shapes = {call: 1 for i in range(2, 60) for call in (linear(i), attention(2, 9 * i), convolution(64, 3 * i))}
    rates.forecast(Census(shapes, ()), 0)
    assert len(clockwork) == count


def test_a_later_process_measures_nothing(clockwork):
    work = Census({linear(300): 3, convolution(32, 9, groups=2): 2}, ())
    first = MachineRates(THIS).forecast(work, 0)
    clockwork.clear()
    assert MachineRates(THIS).forecast(work, 0) == first
    assert clockwork == []


@pytest.mark.parametrize("field", Machine.model_fields)
def test_another_machine_or_code_is_measured_by_itself(clockwork, field):
    MachineRates(THIS).heavy_ms(linear(8), 0)
    first = clockwork.copy()
    clockwork.clear()
    other = THIS.model_copy(update={field: 2 if field == "threads" else "other"})
    MachineRates(other).heavy_ms(linear(8), 0)
    assert clockwork == first
    assert len(list_rates()) == 2


def cut(text: str) -> str:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda text: "",
        lambda text: "[" * 10_000,
        lambda text: text.replace('"format":1', '"format":2').replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"cpu": "a"', '"cpu": "b"'),
        lambda text: text.replace("50.0", "-1.0"),
        lambda text: text.replace("50.0", "NaN"),
        lambda text: text.replace("50.0,", "", 1),
    ],
    ids=["cut", "empty", "nested", "format", "foreign", "negative", "nan", "short"],
)
def test_a_file_that_is_broken_or_foreign_is_measured_again(clockwork, damage: Callable[[str], str]):
    first = MachineRates(THIS).heavy_ms(linear(300), 0)
    path = rates_path(THIS)
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    assert not list_rates()
    asked = clockwork.copy()
    clockwork.clear()
    assert MachineRates(THIS).heavy_ms(linear(300), 0) == first
    assert clockwork == asked
    assert list(list_rates()) == [path]


def test_rates_that_others_could_have_written_are_not_read(clockwork):
    MachineRates(THIS).heavy_ms(linear(8), 0)
    rates_path(THIS).chmod(0o666)
    assert read_rates(THIS).tables == {}
    assert not list_rates()


def test_measuring_is_said_once_with_the_reason(clockwork):
    class Heard(Progress):
        def __init__(self) -> None:
            super().__init__()
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    heard = Heard()
    rates = MachineRates(THIS, progress=heard)
    rates.forecast(Census({linear(8): 1, attention(1, 80): 1}, ()), 0)
    assert len(heard.notes) == 1
    assert "once" in heard.notes[0]
    assert str(rates_path(THIS)) in heard.notes[0]
    again = Heard()
    MachineRates(THIS, progress=again).forecast(Census({linear(8): 1}, ()), 0)
    assert again.notes == []


def test_a_kernel_that_is_slow_is_not_timed_on_what_takes_long(monkeypatch):
    """bfloat16 convolutions run at 0.6 GFLOP/s where the CPU has no instruction for them."""
    asked: list[float] = []

    def time_of(call: HeavyCall, stand_in: Any = None) -> float:
        asked.append(call.flops / 0.6e6)
        return asked[-1]

    monkeypatch.setattr(machine_rates, "time_call", time_of)
    kind = GridKind("convolution", torch.ops.aten.conv2d.default, (torch.bfloat16,) * 2, kernel=3)
    rates = measure_rates(kind, None)
    assert len(rates) == 48
    assert rates == pytest.approx([0.6] * 48)
    assert max(asked) <= machine_rates.MAX_POINT_SECONDS * 1e3
    assert sum(asked) < 3e3


def test_what_a_machine_is_known_by():
    recipe = resolve("baseline", (), "shapes")
    aoti = load_backend("aoti")
    machine = describe_machine(recipe.compile, aoti)
    assert machine.threads == torch.get_num_threads()
    assert machine.torch == torch.__version__
    assert (machine.backend, machine.isa) == ("aoti", "host")
    portable = recipe.compile.model_copy(update={"isa": "x86-64-v3"})
    assert describe_machine(portable, aoti).file_name != machine.file_name


# --- where in a grid a call lies ------------------------------------------------------------------------------------------


def test_a_call_lies_where_its_sizes_are():
    place = rate_grid.place_call
    assert place(linear(10, 20, 30)).at == (10, 20, 30)
    assert place(attention(3, 70, 40)).at == (70, 70, 40)
    assert place(convolution(32, 9)).at == (81, 32, 32)
    batch = HeavyCall(torch.ops.aten.matmul.default, (operand(2, 4, 7, 5), operand(2, 4, 5, 6)), (), 2 * 8 * 7 * 5 * 6)
    assert place(batch).at == (7, 5, 6)
    added = HeavyCall(
        torch.ops.aten.addmm.default, (operand(6), operand(7, 5), operand(5, 6, constant=True)), (), 2 * 7 * 5 * 6
    )
    assert place(added).at == (7, 5, 6)
    assert place(added).kind == place(linear(8)).kind
    assert place(convolution(32, 9, groups=4)) is None


@pytest.mark.parametrize(
    "kind",
    [
        GridKind("matmul", LINEAR, (torch.float32,) * 2),
        GridKind("matmul", torch.ops.aten._int_mm.default, (torch.int8,) * 2),
        GridKind("matmul", w8a8.INT8_OPERATOR.default, (torch.float32, torch.int8)),
        GridKind("convolution", torch.ops.aten.conv2d.default, (torch.float32,) * 2, 3, channels_last=True),
        GridKind("convolution", torch.ops.aten.conv2d.default, (torch.float32,) * 2),
        GridKind("convolution", w8a8.CONV2D_OPERATOR.default, (torch.float32, torch.int8), 3),
        GridKind("attention", torch.ops.aten.scaled_dot_product_attention.default, (torch.float32,)),
        GridKind("attention", torch.ops.aten.scaled_dot_product_attention.default, (torch.float32,), masked=True),
    ],
    ids=lambda kind: kind.name,
)
def test_what_is_timed_at_a_point_lies_at_that_point(monkeypatch, kind):
    monkeypatch.setattr(rate_grid, "AXES", SMALL_AXES)
    for at in rate_grid.grid_points(kind):
        call = rate_grid.grid_call(kind, at)
        assert rate_grid.place_call(call) == rate_grid.GridPlace(kind, at)
    assert time_call(call) > 0


def test_rates_between_the_points():
    table = rate_grid.RateTable(axes={"rows": (1, 4), "inner": (10, 1000)}, gflops=(1.0, 100.0, 10.0, 1000.0))
    at = {(1, 10): 1, (4, 1000): 1000, (1, 100): 10, (2, 100): 10**1.5, (4, 10): 10, (9, 1): 10, (1, 5000): 100}
    for place, rate in at.items():
        assert rate_grid.interpolate_rate(table, place) == pytest.approx(rate), place


# --- what is predicted ----------------------------------------------------------------------------------------------------


def test_times_add_up(clockwork):
    rates = MachineRates(THIS)
    one, other = (
        Census({linear(80): 3}, (FusedLoop(800, 800, 400),)),
        Census({linear(160): 1}, (FusedLoop(80, 80, 40),) * 2),
    )
    both = Census({**one.heavy, **other.heavy}, one.loops + other.loops)
    assert rates.forecast(both, 0).ms == pytest.approx(rates.forecast(one, 0).ms + rates.forecast(other, 0).ms)
    assert rates.forecast(one, 0).heavy_ms == {"matmul float32": pytest.approx(3 * 2 * 80 * 64 * 64 / 5e7)}


def test_variants_beyond_the_alphabet_share_a_sign():
    names = [f"v{i}" for i in range(40)]
    letters = assign_signs(names)
    assert list(letters) == names
    assert "".join(letters.values()) == VARIANT_SIGNS + "?" * 12


def test_more_work_takes_longer(clockwork):
    rates = MachineRates(THIS)
    assert rates.heavy_ms(linear(80), 0) < rates.heavy_ms(linear(90), 0)
    assert rates.loop_ms(FusedLoop(1 << 20, 1 << 20, 1 << 18)) < rates.loop_ms(FusedLoop(1 << 20, 1 << 21, 1 << 18))
    assert rates.loop_ms(FusedLoop(1 << 20, 1 << 20, 1 << 18)) < rates.loop_ms(FusedLoop(1 << 20, 1 << 20, 1 << 24))


def test_weights_take_as_long_as_they_take_to_be_read(clockwork, monkeypatch):
    """One row has little arithmetic; what it waits for are weights that no cache holds."""
    read: list[int] = []
    monkeypatch.setattr(MachineRates, "read_bandwidth", lambda self, constants: read.append(constants) or 1e5)
    row = linear(1, 512, 512)
    assert MachineRates(THIS).heavy_ms(row, 12345) == pytest.approx(4 * 512 * 512 / 1e5)
    assert read == [12345]


def test_the_machines_own_rates_are_measured_once(monkeypatch):
    asked: list[Any] = []

    def timed(run) -> float:
        run()
        asked.append(run)
        return 0.5

    monkeypatch.setattr(machine_rates, "time_runs", timed)
    for _ in range(2):
        rates = MachineRates(THIS)
        first = [rates.loop_ms(FusedLoop(1000, 1000, 500)) for _ in range(3)]
        assert len(set(first)) == 1
        assert len(asked) == 3  # bandwidth, a value, a call
    assert rates.bandwidth(1 << 40) == rates.bandwidth(COLD_BYTES)


# --- timing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [linear(10_000, 2048, 4096), attention(64, 1024)])
def test_a_long_call_is_timed_on_a_part_of_it(call):
    part, times = reduce_rows(call)
    assert times > 1
    length = {True: 1, False: -2}[call.kind == "attention"]
    assert part.operands[0].shape[length] * times == pytest.approx(call.operands[0].shape[length])
    assert call.flops / times <= PROBE_FLOPS
    assert time_call(part) > 0  # the shapes still fit together


def test_what_a_backend_calls_instead_is_what_is_timed():
    asked, ran = [], []

    def stand_in(op, arguments, keywords):
        asked.append((op, [tuple(a.shape) for a in arguments]))
        return (lambda: ran.append(torch.ones(1 << 18).exp())) if op is not LINEAR else None

    assert time_call(attention(1, 8), stand_in) > 0
    assert len(ran) > MIN_TIMED_RUNS
    count = len(ran)
    assert time_call(linear(8), stand_in) > 0
    assert len(ran) == count
    assert asked == [(attention(1, 8).op, [(1, 1, 8, 64)] * 3), (LINEAR, [(1, 8, 64), (64, 64)])]


def test_a_stand_in_is_opened_where_something_is_measured_and_not_before(clockwork):
    opened: list[int] = []
    for _ in range(2):
        MachineRates(THIS, lambda: opened.append(1)).forecast(Census({linear(8): 1, attention(1, 8): 1}, ()), 0)
    assert opened == [1]


def test_a_short_call_is_timed_as_it_is():
    assert reduce_rows(linear(80)) == (linear(80), 1.0)


def test_a_long_run_is_timed_twice_and_no_more(monkeypatch):
    ran: list[int] = []
    seconds = iter(range(100))
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(timing.time, clock, lambda: next(seconds))
    assert time_runs(lambda: ran.append(1)) == 1000
    assert len(ran) == 2


def test_real_kernels_predict_that_skipping_attention_is_cheaper(tiny_pipe, monkeypatch):
    from prebake.exporter.capture.variants import capture_variants
    from prebake.exporter.families import flux
    from prebake.exporter.plan import PlanSet
    from prebake.exporter.progress import open_progress
    from prebake.exporter.sites.marks import Variant
    from support.known_layouts import layout_of

    monkeypatch.setattr(rate_grid, "AXES", SMALL_AXES)
    denoiser = flux.denoiser(tiny_pipe, flux.Size(32, 32, 8))
    marks = tuple(a.mark() for a in layout_of(denoiser).attentions)
    variants = (Variant("full", ()), Variant("reuse", tuple((m.name, "combine") for m in marks)))
    _, graphs = capture_variants(denoiser, PlanSet(marks, variants, ()), open_progress("quiet"))
    rates = MachineRates(THIS)
    full, reuse = (rates.forecast(take_census(g), 1 << 20) for g in graphs)
    assert 0 < reuse.ms < full.ms
    assert set(full.heavy_ms) - set(reuse.heavy_ms) == {"attention float32"}
