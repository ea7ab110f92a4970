"""How long a graph would take on this machine, before it is compiled: its census times rates that are measured here, once.

The model. A heavy call takes its FLOPs at the rate of its kind, but no less than its weights take to be read, and no less
than a call of next to nothing. The rate is one of a table: GFLOP/s of the very operator in eager, or of what the backend
calls in its stead, at each point of a grid of sizes (`rate_grid.py`); between the points it is linear in the logarithms of
sizes and rate, beyond them that of the edge. Compiled code calls the same kernels (oneDNN and BLAS products, PyTorch's
attention). Batch and heads multiply the time. Weights are read at the bandwidth of reading as many bytes as all constants
of the graph have: those of small models stay in the cache. A call that no grid is of is timed at its own shapes.
The fused loops in between take what their bytes take at the bandwidth measured for that many bytes, or what their values
take to compute, whichever is more, and a little for being started.

A table is measured as a whole when the first graph needs it, and then kept with all others of this kind of machine
(`runtime/rates/rates_file.py`): the CPU and its flags, the number of threads, torch, the backend, its kernels and its
instruction set. A point that would take longer than `MAX_POINT_SECONDS` has the rate of the nearest one that was measured,
and none has a lower rate than one with fewer rows, pixels or queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...runtime.rates.rates_file import Machine, RateTable, rates_path, read_rates, write_rates
from ..progress import Progress
from .count import Census, FusedLoop, HeavyCall, Operand
from .rate_grid import GridKind, grid_call, grid_points, interpolate_rate, place_call
from .timing import StandIn, reduce_rows, time_call, time_runs

MAX_POINT_SECONDS = 0.25
MEASURING_NOTE = "this machine's rates are not known yet and are measured now, once, for up to a minute; {} keeps them"
COLD_BYTES = 64 << 20  # more than the caches hold
MIN_LOOP_BYTES = 1 << 14  # bytes
READ_BYTES = (1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28)
# Fitted on the four variants of `shapes` in float32 and with int8: a value inside a fused loop costs what one value of an
# eager SiLU in the cache costs, and a loop costs four calls of an eager operator (it is split, and allocates) on top.
CACHED_VALUES = 1 << 15
CALLS_PER_LOOP = 4


@dataclass(frozen=True)
class GraphForecast:
    """Predicted milliseconds of one run: heavy calls by `Heavy.label`, and the `loops` between them."""

    heavy_ms: Mapping[str, float]
    loops_ms: float

    @property
    def ms(self) -> float:
        return sum(self.heavy_ms.values()) + self.loops_ms


class MachineRates:
    """The rates of `machine`, which is this one with torch's present number of threads; what is not known is measured and kept.

    `open_stand_in` gives what the backend calls, asked once, before the first measurement; `progress` is told of each.
    """

    def __init__(
        self,
        machine: Machine,
        open_stand_in: Callable[[], StandIn | None] = lambda: None,
        progress: Progress | None = None,
    ) -> None:
        self._rates = read_rates(machine)
        self._stand_in = functools.cache(open_stand_in)
        self._progress = progress or Progress()
        self._told = False

    def forecast(self, census: Census, constants_bytes: int) -> GraphForecast:
        """The time of a graph whose constants take `constants_bytes` (small models find their weights in the cache)."""
        by_label: dict[str, float] = {}
        for call, count in census.heavy.items():
            by_label[call.label] = by_label.get(call.label, 0.0) + count * self.heavy_ms(call, constants_bytes)
        return GraphForecast(dict(sorted(by_label.items())), sum(map(self.loop_ms, census.loops)))

    def heavy_ms(self, call: HeavyCall, constants_bytes: int) -> float:
        """Milliseconds of one call."""
        place = place_call(call)
        if place is None:
            return self._call_ms_alone(call)
        arithmetic = call.flops / interpolate_rate(self._table(place.kind), place.at) / 1e6
        weights = sum(o.bytes for o in call.operands if o.constant)
        return max(arithmetic, weights / self.read_bandwidth(constants_bytes), self.call_ms())

    def loop_ms(self, loop: FusedLoop) -> float:
        """Milliseconds of one fused loop."""
        moved = loop.reads + loop.writes
        return max(moved / self.bandwidth(moved), loop.values * self.value_ms()) + CALLS_PER_LOOP * self.call_ms()

    def value_ms(self) -> float:
        """Milliseconds that one value takes to compute inside a loop."""
        if self._rates.value_ms is None:
            x, y = torch.full([CACHED_VALUES], 0.5), torch.empty(CACHED_VALUES)
            self._keep(value_ms=time_runs(lambda: torch.ops.aten.silu.out(x, out=y)) / CACHED_VALUES)
        return self._rates.value_ms or 0.0

    def call_ms(self) -> float:
        """Milliseconds of an operator that has next to nothing to do."""
        if self._rates.call_ms is None:
            x, y = torch.ones(1), torch.empty(1)
            self._keep(call_ms=time_runs(lambda: torch.add(x, x, out=y)))
        return self._rates.call_ms or 0.0

    def bandwidth(self, moved: int) -> float:
        """Bytes per millisecond of a loop that moves `moved` bytes, to the next power of two."""
        size = max(MIN_LOOP_BYTES, 1 << (moved - 1).bit_length())
        size = min(size, COLD_BYTES)
        if size not in self._rates.bandwidth:
            a, b, c = (torch.full([size // 12], 0.5) for _ in range(3))  # two are read, one is written
            rate = size / time_runs(lambda: torch.add(a, b, out=c))
            self._keep(bandwidth={**self._rates.bandwidth, size: rate})
        return self._rates.bandwidth[size]

    def read_bandwidth(self, constants_bytes: int) -> float:
        """Bytes per millisecond at which weights are read, of so many in all."""
        size = next((s for s in READ_BYTES if s >= constants_bytes), READ_BYTES[-1])
        if size not in self._rates.reading:
            x = torch.full([size // 4], 0.5)
            self._keep(reading={**self._rates.reading, size: size / time_runs(x.sum)})
        return self._rates.reading[size]

    def _table(self, kind: GridKind) -> RateTable:
        if (known := self._rates.tables.get(kind.name)) and known.axes == dict(kind.axes):
            return known
        self._announce(kind.name)
        made = RateTable(axes=dict(kind.axes), gflops=tuple(measure_rates(kind, self._stand_in())))
        self._keep(tables={**self._rates.tables, kind.name: made})
        return made

    def _call_ms_alone(self, call: HeavyCall) -> float:
        said = describe_call(call)
        if said not in self._rates.calls:
            part, times = reduce_rows(call)
            self._keep(calls={**self._rates.calls, said: times * time_call(part, self._stand_in())})
        return self._rates.calls[said]

    def _announce(self, what: str) -> None:
        if not self._told:
            self._told = True
            self._progress.note(MEASURING_NOTE.format(rates_path(self._rates.machine)))
        self._progress.announce(f"measures {what}")

    def _keep(self, **known: object) -> None:
        self._rates = self._rates.model_copy(update=known)
        write_rates(self._rates)


def measure_rates(kind: GridKind, stand_in: StandIn | None) -> list[float]:
    """GFLOP/s at every point of the kind's grid, small calls first."""
    points = list(grid_points(kind))
    calls = {at: grid_call(kind, at) for at in points}
    rates: dict[tuple[int, ...], float] = {}
    for at in sorted(points, key=lambda at: calls[at].flops):
        near = min(rates, key=lambda other: grid_distance(at, other), default=None)
        long = near and calls[at].flops / rates[near] / 1e9 > MAX_POINT_SECONDS
        ms = None if long else time_call(calls[at], stand_in)
        rates[at] = calls[at].flops / ms / 1e6 if ms else rates[near or at]
    for at in points:  # more rows, pixels or queries could be done in parts, so what is slower at them was disturbed
        fewer = [n for n in next(iter(kind.axes.values())) if n < at[0]]
        rates[at] = max([rates[at], *(rates[n, *at[1:]] for n in fewer)])
    return [rates[at] for at in points]


def grid_distance(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


def describe_call(call: HeavyCall) -> str:
    """The operator with its arguments, for people and as a key."""

    def say(value: object) -> str:
        if isinstance(value, Operand):
            strides = "" if value.stride == torch.empty(value.shape, device="meta").stride() else f" by {value.stride}"
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"
        return repr(value)

    keywords = [f"{name}={say(value)}" for name, value in call.keywords]
    return f"{call.op}({', '.join([*map(say, call.arguments), *keywords])})"
