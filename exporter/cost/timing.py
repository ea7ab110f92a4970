"""Timing: how long an operator takes here, in eager, on made-up values."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..private_torch import map_tree
from .count import HeavyCall, Operand

PROBE_FLOPS = 2e9  # a larger call is timed on fewer rows
PROBE_SECONDS = 0.01  # for one call
LONG_PROBE_SECONDS = 0.04  # a call is timed twice at least, and no more often than takes this
MIN_TIMED_RUNS = 5  # timed runs


StandIn = Callable[[Any, tuple[Any, ...], dict[str, Any]], Callable[[], Any] | None]
"""From an operator and what it is called with to what a backend calls in its stead, None where that is the operator itself."""


def reduce_rows(call: HeavyCall) -> tuple[HeavyCall, float]:
    """The call on as few rows (of a convolution: image rows, of attention: heads) as take `PROBE_FLOPS`, and how many
    times that is the call."""
    first = call.operands[0]
    axis = {"attention": 1, "convolution": 2}.get(call.kind, len(first.shape) - 2)
    if axis >= len(first.shape):
        return call, 1.0
    length = first.shape[axis]
    short = max(1, int(length * PROBE_FLOPS / call.flops))
    if short >= length or (call.kind == "convolution" and short < 8):
        return call, 1.0

    def cut(o: Operand) -> Operand:
        shared = call.kind == "attention" and o.shape[axis] == length
        return replace(o, shape=(*o.shape[:axis], short, *o.shape[axis + 1 :])) if o is first or shared else o

    arguments = tuple(cut(a) if isinstance(a, Operand) else a for a in call.arguments)
    return replace(call, arguments=arguments), length / short


def time_call(call: HeavyCall, stand_in: StandIn | None = None) -> float:
    """Milliseconds of the operator itself, or of what compiled code calls in its stead, on made-up values."""
    filled = {o: make_tensor(o) for o in call.operands}
    arguments, keywords = map_tree(Operand, filled.__getitem__, (call.arguments, dict(call.keywords)))
    run = stand_in and stand_in(call.op, arguments, keywords)
    return time_runs(run or functools.partial(call.op, *arguments, **keywords))


def make_tensor(o: Operand) -> Tensor:
    """A tensor of these strides; not zeros, which the system may keep in one page for all."""
    made = torch.empty_strided(o.shape, o.stride, dtype=o.dtype)
    return made.fill_(0.5 if o.dtype.is_floating_point else 1)


def time_runs(run: Callable[[], Any]) -> float:
    """Milliseconds of `run`: the least of several, since other work on the machine only adds."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: list[float] = []
    with torch.no_grad():
        while len(taken) < 2 or sum(taken) < LONG_PROBE_SECONDS:
            start = clock()
            run()
            taken.append(clock() - start)
            if len(taken) > MIN_TIMED_RUNS and sum(taken[1:]) > PROBE_SECONDS:
                break
    return max(min(taken) * 1e3, 1e-6)
