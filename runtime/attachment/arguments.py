"""A denoiser's call as flat named values: what an exporter records of it, and what an attached artifact is held to.

A `forward` call comes in as its bound arguments; out come its leaves by name (`added_cond_kwargs.text_embeds`,
`controlnet_block_samples.0`), each a tensor or a plain value. `Argument` says of one leaf what was seen at export, and
`Argument.problem` in a sentence what is wrong with another one. No diffusers here: structures are tuples, lists and
dicts, and diffusers' output classes are dicts.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from ..bounds import MAX_ITEMS, Count, Float64, Name, PlainInteger, Shape
from ..errors import ArtifactError
from ..plan import FROZEN_CONFIG

PlainValue = bool | PlainInteger | Float64 | Name | None
ArgumentRole = Literal["latents", "fixed", "step", "baked", "constant"]
STEP_TOLERANCE = 1e-4  # relative: other machines' timesteps differ by float32 rounding, those of 1000 steps by 1e-3
CALL_WAY_OUT = (
    "its graphs are compiled for the call of the export; call the pipeline as the recipe did, or export again"
)
WAYS_OUT = {
    "shape": "call with the sizes, the batch and one image per prompt of the export, or export again",
    "dtype": "load the pipeline in the dtype of the recipe's precision, or export again",
    "value": "call the pipeline with the export's arguments, or export again",
    "step": "the plan is for the schedule of the export: give no sigmas, timesteps or strength of your own, or export again",
    "baked": "this model reads it in Python, so that the graph holds for these values alone: take a prompt of as many tokens "
    "as the export's, or export again with this one",
}


class EmptyContainer(BaseModel):
    """A tuple, list or dict without anything in it, as a leaf."""

    model_config = FROZEN_CONFIG
    empty: Literal["sequence", "mapping"]


class Argument(BaseModel):
    """One leaf of a call as the export saw it.

    `latents` change with the scheduler's output, `fixed` are equal at every step: of both shape and dtype are held to.
    `step` tensors change with the schedule alone; their values are in the plan. `baked` tensors are compiled in, since the
    model reads them in Python: `sha256` is over their bytes. A `constant` is no tensor, and has a `value`.
    """

    model_config = FROZEN_CONFIG
    name: Name
    role: ArgumentRole
    shape: Shape = ()
    dtype: Name = ""
    value: PlainValue | EmptyContainer = None
    sha256: Name = ""
    nonzero: Count = 0

    @property
    def is_input(self) -> bool:
        """Whether the graph takes it."""
        return self.role in ("latents", "fixed", "step")

    def problem(self, came: Any, device: torch.device, expected: Sequence[float] = ()) -> str:
        """What is wrong with `came` in this argument's place, or ''. `expected` are the values of a `step` tensor."""
        if self.role == "constant":
            return (
                ""
                if is_same_value(self.value, came)
                else self._describe_mismatch(describe_value(self.value), describe_value(came), "value")
            )
        if not isinstance(came, Tensor):
            return self._describe_mismatch(self._describe_tensor(device), describe_value(came), "value")
        if tuple(came.shape) != self.shape or came.device != device:
            return self._describe_mismatch(self._describe_tensor(device), describe_value(came), "shape")
        if dtype_name(came) != self.dtype:
            return self._describe_mismatch(self._describe_tensor(device), describe_value(came), "dtype")
        if self.role == "step" and not is_near(tensor_numbers(came), expected):
            return self._describe_mismatch(
                f"{format_numbers(expected)} at this evaluation", format_numbers(tensor_numbers(came)), "step"
            )
        if self.role == "baked" and tensor_sha256(came) != self.sha256:
            held, found = f"{self.nonzero} of {math.prod(self.shape)} values set", int(came.count_nonzero())
            return self._describe_mismatch(f"the values of the export ({held})", f"others ({found} set)", "baked")
        return ""

    def _describe_tensor(self, device: torch.device) -> str:
        return f"{self.dtype} {list(self.shape)} on {device}"

    def _describe_mismatch(self, expected: str, came: str, way_out: str) -> str:
        return f"argument {self.name!r}: expected {expected}, got {came}; {WAYS_OUT[way_out]}"


# --- calls as leaves ------------------------------------------------------------------------------------------------


def bind_call(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The call by the forward's own names, defaults filled in. Raises TypeError as the call itself would."""
    arguments = signature.bind(*args, **kwargs)
    arguments.apply_defaults()
    return arguments


def named_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of everything in nested tuples, lists and dicts that is none of these; an empty one is a leaf."""
    if isinstance(value, Mapping):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    else:
        yield name, value
        return
    if not items:
        yield name, EmptyContainer(empty="mapping" if isinstance(value, Mapping) else "sequence")
    for key, item in items:
        yield from named_leaves(item, f"{name}.{key}" if name else str(key))


def map_leaves(value: Any, leaf: Callable[[str, Any], Any], name: str = "") -> Any:
    """A copy of the nested structure with `leaf(name, value)` in each leaf's place."""
    if isinstance(value, Mapping) and value:
        return {key: map_leaves(item, leaf, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
    if isinstance(value, tuple | list) and value:
        items = [map_leaves(item, leaf, f"{name}.{i}" if name else str(i)) for i, item in enumerate(value)]
        return type(value)(items) if type(value) in (tuple, list) else tuple(items)
    return leaf(name, value)


def argument_name_problems(expected: Sequence[Argument], came: Mapping[str, Any]) -> str:
    """A sentence that names the arguments that are missing, and those that are too many; '' where none is."""
    names = [a.name for a in expected]
    wrong = [f"{n!r} is missing" for n in names if n not in came]
    wrong += [f"{n!r} was not there at export" for n in came if n not in names]
    return f"{', '.join(wrong)}: the call has other arguments than the export's; {CALL_WAY_OUT}" if wrong else ""


# --- values ---------------------------------------------------------------------------------------------------------


def is_same_value(expected: Any, came: Any) -> bool:
    """Equality in which True is no 1, and 1, 1.0 and NumPy's are one number. A tensor equals nothing."""
    if isinstance(expected, bool) or isinstance(came, bool) or not isinstance(expected, int | float):
        return type(expected) is type(came) and expected == came
    return isinstance(came, numbers.Real) and expected == came


def tensor_numbers(tensor: Tensor) -> tuple[float, ...]:
    """The tensor's numbers, only the first where all are that one."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() > 1 and bool((flat == flat[0]).all()):
        flat = flat[:1]
    return tuple(float(v) for v in flat.tolist())


def is_near(came: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether both are one list of numbers but for rounding."""
    return len(came) == len(expected) and all(
        math.isclose(a, b, rel_tol=STEP_TOLERANCE, abs_tol=1e-7) for a, b in zip(came, expected, strict=True)
    )


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 over the tensor's bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """torch's name, e.g. `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def describe_value(value: Any) -> str:
    """A value for an error: a tensor by dtype, shape and device, anything else briefly."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value)} {list(value.shape)} on {value.device}"
    if isinstance(value, EmptyContainer):
        return {"sequence": "an empty list", "mapping": "an empty dict"}[value.empty]
    return f"{value!r:.60}"


def format_numbers(numbers: Sequence[float]) -> str:
    """The first three of them."""
    few = ", ".join(f"{n:g}" for n in numbers[:3])
    return f"{few}, ... ({len(numbers)} values)" if len(numbers) > 3 else few


# --- outputs --------------------------------------------------------------------------------------------------------


class OutputStructure(BaseModel):
    """What the denoiser returns around its one tensor: the tensor itself, a tuple, a list, a dict or one of diffusers'
    output classes (`cls`, its full name). `items` by name or position; a leaf that is no tensor is a `value`."""

    model_config = FROZEN_CONFIG
    kind: Literal["tensor", "constant", "tuple", "list", "dict"]
    cls: Name = ""
    items: Annotated[dict[Name, OutputStructure], Field(max_length=MAX_ITEMS)] = {}
    value: PlainValue = None

    def wrap_tensor(self, tensor: Tensor, classes: Mapping[str, type]) -> Any:
        """The structure with `tensor` in it. `classes` has every `cls`."""
        if self.kind == "tensor":
            return tensor
        if self.kind == "constant":
            return self.value
        items = {name: item.wrap_tensor(tensor, classes) for name, item in self.items.items()}
        if self.kind == "dict":
            return classes[self.cls](**items) if self.cls else items
        return tuple(items.values()) if self.kind == "tuple" else list(items.values())

    def class_names(self) -> set[str]:
        """Every `cls` in it."""
        inside = (item.class_names() for item in self.items.values())
        return {self.cls} - {""} | set().union(*inside)


def diffusers_class(name: str) -> type:
    """One of diffusers' output classes, from the diffusers that the caller's pipeline has imported. Raises ArtifactError
    for anything else: a manifest names no other code."""
    import sys

    module, _, cls = name.rpartition(".")
    found = getattr(sys.modules.get(module), cls, None) if module.startswith("diffusers.") else None
    if not (isinstance(found, type) and issubclass(found, dict)):
        raise ArtifactError(
            f"manifest.json [pipeline.output]: expected an output class of the diffusers that is imported, got {name!r}; "
            "install the exporter's diffusers, or export again"
        )
    return found
