"""How long a graph would take on this machine, before it is compiled: its census times rates that are measured here.

A heavy call takes as long as the very operator takes in eager at the graph's own shapes, strides and dtypes: compiled
code calls the same kernels (oneDNN and BLAS products, PyTorch's attention), or others that the backend names. The fused loops in between take what their
bytes take at the bandwidth measured for that many bytes, or what their values take to compute, whichever is more, and a
little for being started. Every distinct call is timed once, for a few milliseconds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..private_torch import map_tree
from .count import Census, FusedLoop, HeavyCall, Operand

PROBE_FLOPS = 2e9  # a larger call is timed on fewer rows
PROBE_SECONDS = 0.02  # for one call
MIN_TIMED_RUNS = 5  # timed runs
COLD_BYTES = 64 << 20  # more than the caches hold
COMPUTE_BOUND_INTENSITY = 64  # FLOPs per byte from which on it does not matter where weights lie
MIN_LOOP_BYTES = 1 << 14  # bytes
# Fitted on the four variants of `shapes` in float32 and with int8: a value inside a fused loop costs what one value of an
# eager SiLU in the cache costs, and a loop costs four calls of an eager operator (it is split, and allocates) on top.
CACHED_VALUES = 1 << 15
CALLS_PER_LOOP = 4


StandIn = Callable[[Any, tuple[Any, ...], dict[str, Any]], Callable[[], Any] | None]
"""From an operator and what it is called with to what a backend calls in its stead, None where that is the operator itself."""


@dataclass(frozen=True)
class GraphForecast:
    """Predicted milliseconds of one run: heavy calls by `Heavy.label`, and the `loops` between them."""

    heavy_ms: Mapping[str, float]
    loops_ms: float

    @property
    def ms(self) -> float:
        return sum(self.heavy_ms.values()) + self.loops_ms


class MachineRates:
    """This machine's rates with torch's present number of threads; what is timed is remembered."""

    def __init__(self, stand_in: StandIn | None = None) -> None:
        self._stand_in = stand_in
        self._heavy: dict[tuple[HeavyCall, int], float] = {}
        self._bandwidth: dict[int, float] = {}
        self._value: float | None = None
        self._call: float | None = None

    def forecast(self, census: Census, constants_bytes: int) -> GraphForecast:
        """The time of a graph whose constants take `constants_bytes` (small models find their weights in the cache)."""
        by_label: dict[str, float] = {}
        for call, count in census.heavy.items():
            by_label[call.label] = by_label.get(call.label, 0.0) + count * self.heavy_ms(call, constants_bytes)
        return GraphForecast(dict(sorted(by_label.items())), sum(map(self.loop_ms, census.loops)))

    def heavy_ms(self, call: HeavyCall, constants_bytes: int) -> float:
        """Milliseconds of one call."""
        copies = count_copies(call, constants_bytes)
        if (call, copies) not in self._heavy:
            probed, scale = reduce_rows(call)
            self._heavy[call, copies] = scale * time_call(probed, copies, self._stand_in)
        return self._heavy[call, copies]

    def loop_ms(self, loop: FusedLoop) -> float:
        """Milliseconds of one fused loop."""
        moved = loop.reads + loop.writes
        return max(moved / self.bandwidth(moved), loop.values * self.value_ms()) + CALLS_PER_LOOP * self.call_ms()

    def value_ms(self) -> float:
        """Milliseconds that one value takes to compute inside a loop."""
        if self._value is None:
            x, y = torch.full([CACHED_VALUES], 0.5), torch.empty(CACHED_VALUES)
            self._value = time_runs(lambda _: torch.ops.aten.silu.out(x, out=y), 1) / CACHED_VALUES
        return self._value

    def call_ms(self) -> float:
        """Milliseconds of an operator that has next to nothing to do."""
        if self._call is None:
            x, y = torch.ones(1), torch.empty(1)
            self._call = time_runs(lambda _: torch.add(x, x, out=y), 1)
        return self._call

    def bandwidth(self, moved: int) -> float:
        """Bytes per millisecond of a loop that moves `moved` bytes, to the next power of two."""
        size = max(MIN_LOOP_BYTES, 1 << (moved - 1).bit_length())
        size = min(size, COLD_BYTES)
        if size not in self._bandwidth:
            a, b, c = (torch.full([size // 12], 0.5) for _ in range(3))  # two are read, one is written
            self._bandwidth[size] = size / time_runs(lambda _: torch.add(a, b, out=c), 1)
        return self._bandwidth[size]


def count_copies(call: HeavyCall, constants_bytes: int) -> int:
    """How many copies of the call's weights to cycle through, so that they are as cold as in the graph."""
    weights = sum(o.bytes for o in call.operands if o.constant)
    if not weights or call.flops > COMPUTE_BOUND_INTENSITY * sum(o.bytes for o in call.operands):
        return 1
    return max(1, min(constants_bytes, COLD_BYTES) // weights)


def reduce_rows(call: HeavyCall) -> tuple[HeavyCall, float]:
    """The call on as few rows (of a convolution: image rows, of attention: heads) as take `PROBE_FLOPS`, and how many
    times that is the call."""
    first = call.operands[0]
    axis = {"attention": 1, "convolution": 2}.get(call.kind, len(first.shape) - 2)
    length = first.shape[axis]
    short = max(1, int(length * PROBE_FLOPS / call.flops))
    if short >= length or (call.kind == "convolution" and short < 8):
        return call, 1.0

    def cut(o: Operand) -> Operand:
        shared = call.kind == "attention" and o.shape[axis] == length
        return replace(o, shape=(*o.shape[:axis], short, *o.shape[axis + 1 :])) if o is first or shared else o

    arguments = tuple(cut(a) if isinstance(a, Operand) else a for a in call.arguments)
    return replace(call, arguments=arguments), length / short


def time_call(call: HeavyCall, copies: int, stand_in: StandIn | None = None) -> float:
    """Milliseconds of the operator itself, or of what compiled code calls in its stead, on made-up values."""
    once = {o: make_tensor(o) for o in call.operands if not o.constant}
    sets = []
    for _ in range(copies):
        filled = once | {o: make_tensor(o) for o in call.operands if o.constant}
        sets.append(map_tree(Operand, filled.__getitem__, (call.arguments, dict(call.keywords))))
    runs = [
        (stand_in and stand_in(call.op, *given)) or functools.partial(call.op, *given[0], **given[1]) for given in sets
    ]
    return time_runs(lambda i: runs[i](), copies)


def make_tensor(o: Operand) -> Tensor:
    """A tensor of these strides; not zeros, which the system may keep in one page for all."""
    made = torch.empty_strided(o.shape, o.stride, dtype=o.dtype)
    return made.fill_(0.5 if o.dtype.is_floating_point else 1)


def time_runs(run: Callable[[int], Any], copies: int) -> float:
    """Milliseconds of `run(i)`, i cycling through the copies: the least, since other work on the machine only adds.

    With copies, the least of the means over all of them.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.no_grad():
        run(0)
        taken: list[float] = []
        while len(taken) * copies < MIN_TIMED_RUNS or sum(taken) < PROBE_SECONDS:
            start = clock()
            for i in range(copies):
                run(i)
            taken.append(clock() - start)
    return min(taken) / copies * 1e3
