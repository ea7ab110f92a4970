"""A compiled graph's call contract, checked on every call: AOTInductor itself accepts anything and returns garbage.

Names and their order, shapes, dtypes, strides and device of the inputs, and the same of the outputs, against the
manifest. Every size is one number, in an artifact of a range by the size of the picture (`RangeContract`), and scalars are tensors among
its inputs or were fixed at export, where no call can give them. `Contract.inputs` and `Contract.outputs` are the two directions;
`benchmarks/contract.py` says what they cost.

Reading six attributes of every tensor costs more than comparing them. So a call that fits leaves behind what each of its
tensors was, and a later one that is like it, by one look of torch's own at each tensor, fits too; any other is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from operator import attrgetter
from typing import NoReturn

import torch

from .errors import ArtifactError, RequestError
from .manifest import Graph, TensorSpec
from .private_torch import likeness_guard
from .sizes.dimension import parse_dimension
from .sizes.size_range import SizeRange

PLAIN_TENSOR_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
"""Compiled code reads memory, and a subclass may keep its numbers elsewhere."""
_tensor_facts = attrgetter("shape", "dtype", "device")
TensorFacts = tuple[torch.Size, torch.dtype, torch.device]


class Contract:
    """What one graph takes and gives, on one device."""

    def __init__(self, graph: Graph, device: torch.device):
        self._graph = graph.name
        self._inputs = tuple(spec.name for spec in graph.inputs)
        self._outputs = tuple(spec.name for spec in graph.outputs)
        self._taken = _expected_facts(graph.inputs, device)
        self._given = _expected_facts(graph.outputs, device)
        self._like: list[Callable[[object], bool]] | None = None  # one for each input
        self._kept = False

    def at_call(self, given: Mapping[str, torch.Tensor]) -> Contract:
        """What holds for that call: this, at every size."""
        return self

    def inputs(self, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The tensors in the graph's order. Raises RequestError naming the input, what was expected, and what came."""
        try:
            flat = [given[name] for name in self._inputs]
        except KeyError:
            flat = []
        if len(flat) != len(given) or len(flat) != len(self._inputs):
            self._refuse_names(given)
        if self._like is None or False in [like(tensor) for like, tensor in zip(self._like, flat, strict=True)]:
            self._refuse_misfits("input", self._inputs, self._taken, flat)
            self._like = [likeness_guard(tensor) for tensor in flat]
        return flat

    def outputs(self, flat: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Name -> tensor. Raises ArtifactError when the graph gave other tensors than the manifest promises, which is looked at
        once: code that was compiled for these inputs gives the same sizes ever after."""
        if len(flat) != len(self._outputs):
            raise ArtifactError(
                f"graph {self._graph!r}: expected {len(self._outputs)} outputs, got {len(flat)}; export again"
            )
        if not self._kept:
            self._refuse_misfits("output", self._outputs, self._given, flat)
            self._kept = True
        return dict(zip(self._outputs, flat, strict=True))

    def _refuse_misfits(
        self, kind: str, names: Sequence[str], facts: Sequence[TensorFacts], flat: Sequence[object]
    ) -> None:
        """Raises RequestError for the first input, ArtifactError for the first output, that is not what is expected of it."""
        for name, fact, got in zip(names, facts, flat, strict=True):
            if not _has_facts(got, fact):
                given = kind == "input"
                way_out = _nearest_legal_call(*fact, got) if given else "export again"
                raise (RequestError if given else ArtifactError)(
                    f"graph {self._graph!r}: {kind} {name!r}: expected contiguous {_describe_facts(*fact)}, got {_describe_given(got)}; {way_out}"
                )

    def _refuse_names(self, given: Mapping[str, torch.Tensor]) -> None:
        names = self._inputs
        wrong = [f"{name!r} is missing" for name in names if name not in given]
        for name in sorted(given.keys() - set(names)):
            near = get_close_matches(name, [n for n in names if n not in given], n=1)
            wrong.append(f"{name!r} is not an input" + (f", did you mean {near[0]!r}?" if near else ""))
        raise RequestError(f"graph {self._graph!r}: {'; '.join(wrong)}; it takes {', '.join(names)}")


KEPT_CONTRACTS = 64
"""Sizes of which a graph's contract is kept, made again otherwise."""


class RangeContract:
    """What one graph of a range takes and gives: at each call a `Contract`, of the size that its inputs are of."""

    def __init__(self, graph: Graph, device: torch.device, sizes: SizeRange):
        self._graph, self._device, self._sizes = graph, device, sizes
        self._axes = tuple(
            (spec.name, axis, parse_dimension(text)) for spec in graph.inputs for axis, text in spec.axes.items()
        )
        self._contracts: dict[tuple[int, ...], Contract] = {}

    def at_call(self, given: Mapping[str, torch.Tensor]) -> Contract:
        """The contract at the size of these inputs. Raises RequestError where they are of no size in the range."""
        try:
            seen = tuple(given[name].shape[axis] for name, axis, _ in self._axes)
        except (KeyError, AttributeError, IndexError):
            return self._contract(*self._sizes.corners[0])  # which says what is missing, or no such tensor
        if seen not in self._contracts:
            size = self._sizes.find_size([(d, n) for (_, _, d), n in zip(self._axes, seen, strict=True)])
            if size is None:
                self._refuse(seen)
            if len(self._contracts) >= KEPT_CONTRACTS:
                self._contracts.clear()
            self._contracts[seen] = self._contract(*size)
        return self._contracts[seen]

    def _contract(self, height: int, width: int) -> Contract:
        try:
            return Contract(self._graph.at(height, width), self._device)
        except ValueError as e:
            raise ArtifactError(f"graph {self._graph.name!r}: {e}; export again") from e

    def _refuse(self, seen: tuple[int, ...]) -> NoReturn:
        came = ", ".join(
            f"{name!r} has {n} in dimension {axis}, which is {dimension}"
            for (name, axis, dimension), n in zip(self._axes, seen, strict=True)
        )
        raise RequestError(
            f"graph {self._graph.name!r}: its inputs are of no size of the artifact, {self._sizes}: {came}; give those of one size in it"
        )


def graph_contract(graph: Graph, device: torch.device, sizes: SizeRange | None) -> Contract | RangeContract:
    """The contract of a graph of an artifact; `sizes` is its range, if it has one."""
    if sizes is None or not any(spec.axes for spec in graph.inputs):
        return Contract(graph, device)
    return RangeContract(graph, device, sizes)


SpecFacts = Mapping[str, tuple[tuple[int, ...], str]]
"""Name -> shape and dtype, as the manifest says them."""


def spec_facts(specs: Iterable[TensorSpec]) -> SpecFacts:
    return {spec.name: (spec.shape, spec.dtype) for spec in specs}


def describe_misfits(where: str, expected: SpecFacts, came: SpecFacts) -> Iterator[str]:
    """What of a graph's inputs or outputs is not what a call gives or takes, a sentence each; `where` they are in the manifest."""
    for name in sorted(expected.keys() | came.keys()):
        if name not in came:
            yield f"{where}: has no {name!r}, which a call needs"
        elif name not in expected:
            yield f"{where}: has {name!r}, which no call knows"
        elif expected[name] != came[name]:
            (shape, dtype), (found, of) = expected[name], came[name]
            yield f"{where}: {name!r} is {of} {list(found)}, a call has {dtype} {list(shape)}"


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name, e.g. `bfloat16`. Raises ArtifactError for a name that torch does not have."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"manifest.json: {name!r} is not a dtype of this torch; export again with this prebake")
    return dtype


def _expected_facts(specs: Sequence[TensorSpec], device: torch.device) -> list[TensorFacts]:
    return [(torch.Size(spec.shape), torch_dtype(spec.dtype), device) for spec in specs]


def _has_facts(got: object, fact: TensorFacts) -> bool:
    """Whether it is a tensor whose memory is what compiled code expects there."""
    return (
        type(got) in PLAIN_TENSOR_TYPES
        and isinstance(got, torch.Tensor)
        and got.layout == torch.strided
        and _tensor_facts(got) == fact
        and got.is_contiguous()
        and not got.is_neg()
        and not got.is_conj()
    )


def _describe_given(got: object) -> str:
    if not isinstance(got, torch.Tensor):
        return type(got).__name__
    came = _describe_facts(tuple(got.shape), got.dtype, got.device)
    if type(got) not in PLAIN_TENSOR_TYPES:
        return f"{came} of the class {type(got).__name__}"
    if got.layout != torch.strided:
        return f"{came}, {got.layout}".replace("torch.", "")
    if got.is_neg() or got.is_conj():
        return f"{came}, a view whose sign is not yet in its memory"
    return came if got.is_contiguous() else f"{came} with strides {tuple(got.stride())}"


def _nearest_legal_call(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, got: object) -> str:
    """The nearest call that is legal."""
    if not isinstance(got, torch.Tensor):
        return "give a tensor" + (f", such as torch.full({list(shape)}, {got})" if isinstance(got, int | float) else "")
    if tuple(got.shape) != shape:
        return f"{list(shape)} is the only shape it was exported for"
    calls = []
    if type(got) not in PLAIN_TENSOR_TYPES:
        return "give a plain torch.Tensor"
    if got.layout != torch.strided:
        calls.append(".to_dense()")
    if got.device != device or got.dtype is not dtype:
        same = [f"{device.type!r}"] * (got.device != device) + [str(dtype)] * (got.dtype is not dtype)
        calls.append(f".to({', '.join(same)})")
    if got.is_neg() or got.is_conj():
        calls.append(".clone()")
    elif got.layout == torch.strided and not got.is_contiguous():
        calls.append(".contiguous()")
    return f"give it {''.join(calls)}"


def _describe_facts(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
