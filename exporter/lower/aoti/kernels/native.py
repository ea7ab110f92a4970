"""The CPU kernels called by themselves, for tests and to be timed: their static library, linked with torch, and tensors passed
as AOTInductor passes them."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .....runtime.private_torch import make_handles, take_tensors
from ... import w8a8
from . import build_archive, run_command
from .layers import LINEAR, find_few_rows_obstacle
from .operators import NO_ACTIVATION, NO_NORM, pack_columns, pack_taps
from .rewrite import SDPA, find_attention_obstacle
from .target import KernelTarget, choose_target

ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
ctypes.pythonapi.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

KERNEL_NAMES = ("packed_w8a8", "packed_w8a8_conv2d", "few_rows", "attention", "rotary")
ADDRESS_SOURCE = "extern int aoti_torch_cpu_{name}();\nvoid* {name}(void) {{ return aoti_torch_cpu_{name}; }}\n"
"""The kernels are hidden in what they are linked into: a function that is not says where each of them is."""


class NativeKernels:
    """A method for each of the operators of `operators.py`, with their arguments.

    `folder` is where their library is kept, for loops of so many threads and CPUs of `target`, or else for this one.
    """

    def __init__(self, folder: Path, threads: int = 1, target: KernelTarget | None = None):
        target = target or choose_target("host")
        assert target is not None, "this CPU has no kernels"
        compiled, torch_folder = build_archive(folder, threads, target), Path(torch.__file__).parent / "lib"
        with tempfile.TemporaryDirectory() as scratch:  # a library that is loaded needs its file no more
            library, source = Path(scratch) / "native.so", Path(scratch) / "addresses.c"
            source.write_text("".join(ADDRESS_SOURCE.format(name=name) for name in KERNEL_NAMES))
            inputs = [str(source), str(compiled), f"-L{torch_folder}", "-ltorch_cpu", "-lstdc++"]
            run_command(["gcc", "-shared", "-fPIC", "-fopenmp", "-o", str(library), *inputs])
            addresses = ctypes.CDLL(str(library))
        self._kernels = {}
        for name in KERNEL_NAMES:
            address = addresses[name]
            address.restype = ctypes.c_void_p
            self._kernels[name] = ctypes.CFUNCTYPE(ctypes.c_int)(address())

    def packed_w8a8(self, xs: list[Tensor], packed: Tensor, scale: Tensor, bias: Tensor | None, act: int) -> Tensor:
        with lend_handles(*xs, packed, scale, *([] if bias is None else [bias])) as handles:
            many = (ctypes.c_void_p * len(xs))(*(h.value for h in handles[: len(xs)]))
            weight, factors, *rest = handles[len(xs) :]
            optional = ctypes.byref(rest[0]) if rest else None
            return self._call(
                "packed_w8a8", many, ctypes.c_int64(len(xs)), weight, factors, optional, ctypes.c_int64(act)
            )

    def packed_w8a8_conv2d(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        kernel: int,
        stride: int,
        padding: int,
        groups: int,
        epsilon: float,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
    ) -> Tensor:
        optional = {
            name: t for name, t in (("bias", bias), ("weight", norm_weight), ("shift", norm_bias)) if t is not None
        }
        with lend_handles(x, packed, scale, *optional.values()) as (picture, weight, factors, *rest):
            at = {name: ctypes.byref(handle) for name, handle in zip(optional, rest, strict=True)}
            numbers = (ctypes.c_int64(n) for n in (kernel, stride, padding, groups))
            norm = (ctypes.c_double(epsilon), at.get("weight"), at.get("shift"))
            return self._call("packed_w8a8_conv2d", picture, weight, factors, at.get("bias"), *numbers, *norm)

    def few_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with lend_handles(x, weight, *([] if bias is None else [bias])) as (rows, by, *rest):
            return self._call("few_rows", rows, by, ctypes.byref(rest[0]) if rest else None)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with lend_handles(q, k, v) as handles:
            return self._call("attention", *handles, ctypes.c_double(scale))

    def rotary(self, x: Tensor, cosines: Tensor, sines: Tensor, to_half: bool) -> Tensor:
        with lend_handles(x, cosines, sines) as handles:
            return self._call("rotary", *handles, ctypes.c_int64(to_half))

    def stand_in(self, op: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Callable[[], Tensor] | None:
        """What takes as long as compiled code does for this call of an operator of a captured graph; None where no kernel is it."""
        if op is w8a8.INT8_OPERATOR.default:
            x, weight, scale, bias = arguments
            packed = pack_columns(weight)
            return lambda: self.packed_w8a8(
                [x.contiguous()], packed, scale, None if bias is None else bias.float(), NO_ACTIVATION
            )
        if op is w8a8.CONV2D_OPERATOR.default:
            x, weight, scale, bias, kernel, *rest = arguments
            x, packed = x.contiguous(memory_format=torch.channels_last), pack_taps(weight, kernel * kernel)
            b = None if bias is None else bias.float()
            return lambda: self.packed_w8a8_conv2d(x, packed, scale, b, kernel, *rest, *NO_NORM)
        if op is LINEAR and not find_few_rows_obstacle(*arguments):
            return lambda: self.few_rows(
                arguments[0].contiguous(), *arguments[1:], *([None] if len(arguments) == 2 else [])
            )
        if op is SDPA and not keywords and len(arguments) == 3 and not find_attention_obstacle(*arguments):
            q, k, v = arguments
            return lambda: self.attention(q, k, v, q.shape[-1] ** -0.5)
        return None

    def _call(self, name: str, *args: Any) -> Tensor:
        made = ctypes.c_void_p()
        assert self._kernels[name](*args, ctypes.byref(made)) == 0
        return take_tensors([ctypes.pythonapi.PyCapsule_New(made, None, None)])[0]


@contextmanager
def lend_handles(*tensors: Tensor) -> Iterator[list[ctypes.c_void_p]]:
    """Handles of tensors, which are taken back in the end."""
    capsules = make_handles(tensors)
    try:
        yield [ctypes.c_void_p(ctypes.pythonapi.PyCapsule_GetPointer(c, None)) for c in capsules]
    finally:
        take_tensors(capsules)
