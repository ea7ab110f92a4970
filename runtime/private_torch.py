"""What replaying uses of torch without a promise of torch's: each such name is here, and in no other file of `runtime/`.

Tried on the CPU with torch 2.13.0 and 2.14.1, and by hand with 2.11 for CUDA. `tests/exporter/test_private_torch.py`
holds each name to the signature that is expected of it, so that a new torch is a change in this file alone. What an
export uses besides is in `exporter/private_torch.py`. The functions inside of a compiled library are no part of torch:
`container.py` lists them. Nothing here imports torch._inductor or torch._dynamo, which are large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _aoti  # pyright: ignore[reportAttributeAccessIssue]  (not in the stubs)
from torch._C._dynamo.guards import TensorGuards


class ModelRunner(Protocol):
    """torch's own runner of a compiled library, by what is used of it. torch 2.15 makes one from outside constants; until
    then nothing public opens a library without unzipping a `.pt2` and asking a compiler (`aoti_load_package`)."""

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        """Name in the library -> name in the model."""
        ...

    def get_constant_names_to_dtypes(self) -> dict[str, int]:
        """Name in the library -> c10::ScalarType."""
        ...

    def update_constant_buffer(
        self,
        tensor_map: Mapping[str, Tensor],
        use_inactive: bool,
        validate_full_updates: bool,
        user_managed: bool = False,
    ) -> None:
        """Binds constants by their names in the library; with `user_managed` to the very memory of the tensors."""
        ...

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """The outputs. It holds Python's lock (https://github.com/pytorch/pytorch/issues/197516)."""
        ...


def open_cpu_runner(so: Path) -> ModelRunner:
    """`AOTIModelContainerRunnerCpu` with one instance. Raises RuntimeError for what is no such library."""
    return _aoti.AOTIModelContainerRunnerCpu(str(so), 1)


def open_cuda_runner(so: Path, device: torch.device) -> ModelRunner:
    """`AOTIModelContainerRunnerCuda` with one instance, by the library's single-threaded entry where this torch lets Python ask
    for that (2.11 does not): a CUDA graph cannot record the other. Raises RuntimeError for what is no such library."""
    try:
        return _aoti.AOTIModelContainerRunnerCuda(str(so), 1, str(device), "", True)
    except TypeError:
        return _aoti.AOTIModelContainerRunnerCuda(str(so), 1, str(device))


def make_handles(tensors: Sequence[Tensor]) -> list[Any]:
    """A handle (`AtenTensorHandle`) for each tensor, in Python's capsules, as Inductor's C++ wrappers pass tensors. They are
    not freed with their capsules: `take_tensors` does it, or the model that takes them. Nothing public does the same."""
    return _aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)


def take_tensors(capsules: Sequence[Any]) -> list[Tensor]:
    """The tensors of handles, which are freed. (torch's function for a single one forgets to.)"""
    return _aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)


def likeness_guard(tensor: Tensor) -> Callable[[object], bool]:
    """Whether something is a tensor of the same class, dtype, device, sizes and strides, and seen alike by torch's dispatcher,
    which tells apart layouts, devices, views with a sign, and modes such as `torch.inference_mode`.

    It never says so of one that differs, and may deny it of one that does not matter: a stride along a size of 1, or
    `requires_grad`. The tensor is not kept. One look in C++, `TensorGuards` of torch.compile; six attributes read in Python do
    the same where it goes.
    """
    guards: Any = TensorGuards  # whose stub leaves out what it is made of
    return guards(tensor, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def is_compiled_module(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: a call of it then goes past a forward that is replaced."""
    return getattr(module, "_compiled_call_impl", None) is not None


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of int8, in int32, by the kernel that quantized layers call. The public `@` does int8 without it."""
    return torch._int_mm(a, b)


def count_writes(tensor: Tensor) -> int:
    """How often the tensor's memory was written to through it or a view of it, in a number that only grows. Writes through `.data`
    are not counted, nor any to a tensor that was made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def count_hooks(module: nn.Module) -> int:
    """How many hooks a call of the module would run, before its forward and after it."""
    return len(module._forward_pre_hooks) + len(module._forward_hooks)
