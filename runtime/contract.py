"""A compiled graph's call contract, checked on every call: AOTInductor itself accepts anything and returns garbage.

Names, shapes, dtypes, contiguity and device of the inputs, and the same of the outputs, against the manifest. Costs a
few microseconds a call; `Contract.inputs` and `Contract.outputs` are the two directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .errors import ArtifactError
from .manifest import Graph, TensorSpec


class Contract:
    """What one graph takes and gives, on one device."""

    def __init__(self, graph: Graph, device: torch.device):
        self._graph = graph.name
        self._device = device
        self._names = frozenset(spec.name for spec in graph.inputs)
        self._inputs = _expectations(graph.inputs)
        self._outputs = _expectations(graph.outputs)

    def inputs(self, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The tensors in the graph's order. Raises ArtifactError naming the input, what was expected, and what came."""
        if given.keys() != self._names:
            self._refuse_names(given)
        flat = []
        for name, shape, dtype in self._inputs:
            tensor = given[name]
            if not self._fits(tensor, shape, dtype):
                self._refuse("input", name, shape, dtype, tensor)
            flat.append(tensor)
        return flat

    def outputs(self, flat: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Name -> tensor. Raises ArtifactError when the graph gave other tensors than the manifest promises."""
        if len(flat) != len(self._outputs):
            raise ArtifactError(
                f"graph {self._graph!r}: expected {len(self._outputs)} outputs, got {len(flat)}; export again"
            )
        named = {}
        for (name, shape, dtype), tensor in zip(self._outputs, flat, strict=True):
            if not self._fits(tensor, shape, dtype):
                self._refuse("output", name, shape, dtype, tensor)
            named[name] = tensor
        return named

    def _fits(self, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.shape == shape
            and tensor.dtype is dtype
            and tensor.device == self._device
            and tensor.is_contiguous()
        )

    def _refuse(self, kind: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, got: object) -> None:
        expected = f"contiguous {_describe(shape, dtype, self._device)}"
        if isinstance(got, torch.Tensor):
            came = _describe(tuple(got.shape), got.dtype, got.device)
            came += "" if got.is_contiguous() else f" with strides {tuple(got.stride())}"
        else:
            came = type(got).__name__
        raise ArtifactError(f"graph {self._graph!r}: {kind} {name!r}: expected {expected}, got {came}")

    def _refuse_names(self, given: Mapping[str, torch.Tensor]) -> None:
        wrong = [f"{name!r} is missing" for name in sorted(self._names - given.keys())]
        wrong += [f"{name!r} is not an input" for name in sorted(given.keys() - self._names)]
        takes = ", ".join(name for name, _, _ in self._inputs)
        raise ArtifactError(f"graph {self._graph!r}: {'; '.join(wrong)}; it takes {takes}")


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name, e.g. `bfloat16`. Raises ArtifactError for a name that torch does not have."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"manifest.json: {name!r} is not a dtype of this torch; export again with this prebake")
    return dtype


def _expectations(specs: Sequence[TensorSpec]) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    return tuple((spec.name, spec.shape, torch_dtype(spec.dtype)) for spec in specs)


def _describe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
