"""Kinds: what several runs of a pipeline say of its denoiser's calls, each argument by its role.

In: the runs of `observation.py`. Out: the distinct kinds of call, whose arguments are latents, equal at every step, given by the
schedule, or compiled in; and for a later call which kind it is and the values that follow the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.attachment.arguments import (
    Argument,
    describe_value,
    dtype_name,
    is_same_value,
    tensor_numbers,
    tensor_sha256,
)
from ...runtime.errors import ExportError
from ...runtime.plan import DenoiserCall
from .observation import ObservedCall, PipelineRun, check_plain_value


@dataclass(frozen=True)
class CallKind:
    """One kind of call: its arguments as the manifest has them, and an example to capture with."""

    arguments: tuple[Argument, ...]
    example: ObservedCall

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.arguments if a.is_input)


def find_call_kinds(
    name: str, real: PipelineRun, stub: PipelineRun, other_seed: PipelineRun, *, baked: frozenset[str] = frozenset()
) -> tuple[CallKind, ...]:
    """The distinct calls of the first evaluation, branch by branch. Raises ExportError for one that changes later."""
    kinds: list[CallKind] = []
    for branch in range(len(real.evaluations[0])):
        runs = [[e[branch] for e in run.evaluations if branch < len(e)] for run in (real, stub, other_seed)]
        first = runs[0][0]
        for seen in (s for run in runs for s in run):
            check_same_arguments(name, first, seen)
        arguments = tuple(classify_argument(n, runs, n in baked) for n in first.flat)
        match = next((i for i, k in enumerate(kinds) if has_same_graph(k.arguments, arguments)), None)
        if match is None:
            kinds.append(CallKind(arguments, first))
        else:
            kinds[match] = CallKind(
                tuple(map(merge_arguments, kinds[match].arguments, arguments)), kinds[match].example
            )
    return tuple(kinds)


def check_same_arguments(name: str, first: ObservedCall, later: ObservedCall) -> None:
    """Raises ExportError unless both calls have the same arguments but for the numbers in tensors."""
    for n in dict.fromkeys((*first.flat, *later.flat)):
        a, b = first.flat.get(n, "nothing"), later.flat.get(n, "nothing")
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype):
            continue
        if isinstance(a, Tensor) or isinstance(b, Tensor) or not is_same_value(a, b):
            raise ExportError(
                f"{name}: argument {n!r} is {describe_value(a)} at the first step and {describe_value(b)} later, and only the numbers in "
                "tensors may change; it cannot be exported"
            )


def classify_argument(name: str, runs: Sequence[Sequence[ObservedCall]], bake: bool) -> Argument:
    """What the two steps of three runs say of one argument: with the real denoiser, with one that answers zeros, and the
    latter from other noise."""
    first = runs[0][0].flat[name]
    if not isinstance(first, Tensor):
        check_plain_value(f"argument {name!r}", first)
        return Argument(name=name, role="constant", value=first)
    real, stub, other = ([s.flat[name] for s in run] for run in runs)
    described = {"name": name, "shape": tuple(first.shape), "dtype": dtype_name(first)}
    if bake:
        return Argument(role="baked", sha256=tensor_sha256(first), nonzero=int(first.count_nonzero()), **described)
    if not all(torch.equal(a, b) for a, b in zip(real, stub, strict=True)):
        return Argument(role="latents", **described)
    moves = not all(torch.equal(stub[0], t) for t in stub)
    if moves and not all(torch.equal(a, b) for a, b in zip(stub, other, strict=True)):
        return Argument(role="latents", **described)
    return Argument(role="step" if moves else "fixed", **described)


def has_same_graph(a: Sequence[Argument], b: Sequence[Argument]) -> bool:
    """True if one graph serves both kinds of call."""
    hidden = {"role": "fixed"}
    return [x.model_copy(update=hidden) if x.is_input else x for x in a] == [
        x.model_copy(update=hidden) if x.is_input else x for x in b
    ]


def merge_arguments(a: Argument, b: Argument) -> Argument:
    """The argument whose role allows more: what is latents in one branch may not be held to the other's schedule."""
    order = ("latents", "fixed", "step", "baked", "constant")
    return min(a, b, key=lambda x: order.index(x.role))


def plan_call(kinds: Sequence[CallKind], seen: ObservedCall) -> DenoiserCall:
    """The call as a plan has it: which kind, and the values of its step tensors. Raises ExportError for an unknown kind."""
    for i, kind in enumerate(kinds):
        if all(is_value_for(a, seen.flat.get(a.name)) for a in kind.arguments) and len(kind.arguments) == len(
            seen.flat
        ):
            return DenoiserCall(
                of=i, values={a.name: tensor_numbers(seen.flat[a.name]) for a in kind.arguments if a.role == "step"}
            )
    raise ExportError(
        "the pipeline calls its denoiser in other ways at other numbers of steps than at two; it cannot be exported"
    )


def is_value_for(a: Argument, value: Any) -> bool:
    if a.role == "constant":
        return is_same_value(a.value, value)
    if not isinstance(value, Tensor) or (tuple(value.shape), dtype_name(value)) != (a.shape, a.dtype):
        return False
    return a.role != "baked" or tensor_sha256(value) == a.sha256
