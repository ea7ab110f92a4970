"""Recorded: a kind of call as a component to capture, its plain values and what the model reads in Python compiled in.

In: the denoiser and the kinds of `call_kinds.py`. Out: `Component`s of flat tensors. Which arguments have to be compiled in is
found by tracing.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...runtime.attachment.arguments import EmptyContainer, map_leaves, named_leaves
from ...runtime.errors import ExportError, error_summary
from ..private_torch import fake_tensor_mode, suspend_modes
from ..sites.component import Component
from .call_kinds import CallKind

BAKED_NUMBERS = 1 << 16  # of one argument that may be compiled in


class FlatDenoiser(nn.Module):
    """The denoiser as a function of flat tensors, everything else as it was recorded; returns its one tensor."""

    def __init__(self, name: str, denoiser: nn.Module, kind: CallKind) -> None:
        super().__init__()
        self.add_module(name, denoiser)
        self.name, self.inputs, self.given = name, kind.inputs, kind.example.arguments
        self.baked = {a.name: kind.example.flat[a.name] for a in kind.arguments if a.role == "baked"}
        self.signature = inspect.signature(denoiser.forward)

    def forward(self, *tensors: Tensor) -> Tensor:
        named = {**self.baked, **dict(zip(self.inputs, tensors, strict=True))}
        arguments = map_leaves(self.given, lambda name, leaf: named.get(name, rebuild_empty(leaf)))
        call = inspect.BoundArguments(self.signature, arguments)  # pyright: ignore[reportArgumentType]
        with TraceTimeConstants(self.baked.values()) if self.baked else contextlib.nullcontext():
            output = self.get_submodule(self.name)(*call.args, **call.kwargs)
        return next(leaf for _, leaf in named_leaves(output) if isinstance(leaf, Tensor))


def rebuild_empty(leaf: Any) -> Any:
    return leaf if not isinstance(leaf, EmptyContainer) else {} if leaf.empty == "mapping" else []


class TraceTimeConstants(TorchFunctionMode):
    """What is computed of `tensors` alone is computed while tracing, as Python numbers are: it may be read in Python."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.known = {id(t): t for t in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for _, leaf in named_leaves([args, kwargs or {}]) if isinstance(leaf, Tensor)]
        if not given or not all(id(t) in self.known for t in given):
            return func(*args, **(kwargs or {}))
        with suspend_modes():
            result = func(*args, **(kwargs or {}))
        self.known.update((id(leaf), leaf) for _, leaf in named_leaves(result) if isinstance(leaf, Tensor))
        return result


def call_component(name: str, denoiser: nn.Module, kind: CallKind, i: int) -> Component:
    """One kind of call as something to capture. Examples are copies: torch.export would merge two names of one tensor."""
    args = tuple(kind.example.flat[n].contiguous().clone() for n in kind.inputs)
    module = FlatDenoiser(name, denoiser, kind).eval()
    label = f".call{i + 1}" if i else ""
    return Component(f"denoiser{label}", module, kind.inputs, ("sample",), args, {"": f"{name}."}, label=label)


def bake_arguments(
    name: str, denoiser: nn.Module, kinds: tuple[CallKind, ...], again: Callable[[frozenset[str]], tuple[CallKind, ...]]
) -> tuple[CallKind, ...]:
    """The kinds, with those integer and boolean arguments compiled in that the model reads in Python: as few as do.

    Raises ExportError where it reads others.
    """
    if tracing_error(name, denoiser, kinds) is None:
        return kinds
    candidates = {
        a.name
        for kind in kinds
        for a in kind.arguments
        if a.role == "fixed"
        and not getattr(torch, a.dtype).is_floating_point
        and kind.example.flat[a.name].numel() <= BAKED_NUMBERS
    }
    if problem := tracing_error(name, denoiser, again(frozenset(candidates))):
        raise ExportError(
            f"{type(denoiser).__name__}: cannot be traced ({error_summary(problem)}); "
            "a model that reads latents or timesteps in Python cannot be exported"
        ) from problem
    for candidate in sorted(candidates):
        if tracing_error(name, denoiser, again(frozenset(candidates - {candidate}))) is None:
            candidates.discard(candidate)
    return again(frozenset(candidates))


def tracing_error(name: str, denoiser: nn.Module, kinds: tuple[CallKind, ...]) -> Exception | None:
    """Why the denoiser cannot run on fake tensors, None if it can."""
    for i, kind in enumerate(kinds):
        made = call_component(name, denoiser, kind, i)
        try:
            with torch.no_grad(), fake_tensor_mode() as fake:
                made.module(*(fake.from_tensor(t) for t in made.args))
        except Exception as e:  # models raise whatever their arithmetic runs into
            return e
    return None
