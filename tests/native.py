"""The CPU kernels called by themselves: their static library, linked with torch, and tensors passed as AOTInductor does."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from prebake.exporter.lower import kernels

HANDLES = cast(Any, torch._C)._aoti  # handles of AOTInductor are pointers to tensors, in Python capsules
ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
ctypes.pythonapi.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

NAMES = ("packed_w8a8", "attention", "rotary")
ADDRESS = "extern int aoti_torch_cpu_{name}();\nvoid* {name}(void) {{ return aoti_torch_cpu_{name}; }}\n"
"""The kernels are hidden in what they are linked into: a function that is not says where each of them is."""


class Native:
    """`native.packed_w8a8(...)`, `native.attention(...)` and `native.rotary(...)`, with the arguments of those operators."""

    def __init__(self, folder: Path, threads: int = 1):
        archive, torch_folder = kernels.archive(folder, threads), Path(torch.__file__).parent / "lib"
        library, source = folder / f"native{threads}.so", folder / "addresses.c"
        source.write_text("".join(ADDRESS.format(name=name) for name in NAMES))
        inputs = [str(source), str(archive), f"-L{torch_folder}", "-ltorch_cpu", "-lstdc++"]
        subprocess.run(["gcc", "-shared", "-fPIC", "-fopenmp", "-o", str(library), *inputs], check=True)
        addresses = ctypes.CDLL(str(library))
        self._kernels = {}
        for name in NAMES:
            address = addresses[name]
            address.restype = ctypes.c_void_p
            self._kernels[name] = ctypes.CFUNCTYPE(ctypes.c_int)(address())

    def packed_w8a8(self, xs: list[Tensor], packed: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        optional = None if bias is None else ctypes.byref(handle(bias))
        many = (ctypes.c_void_p * len(xs))(*(handle(x).value for x in xs))
        return self._call(
            "packed_w8a8", many, ctypes.c_int64(len(xs)), handle(packed), handle(scale), optional, ctypes.c_int64(gelu)
        )

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self._call("attention", handle(q), handle(k), handle(v), ctypes.c_double(scale))

    def rotary(self, x: Tensor, cosines: Tensor, sines: Tensor, to_half: bool) -> Tensor:
        return self._call("rotary", handle(x), handle(cosines), handle(sines), ctypes.c_int64(to_half))

    def _call(self, name: str, *args: Any) -> Tensor:
        made = ctypes.c_void_p()
        assert self._kernels[name](*args, ctypes.byref(made)) == 0
        return HANDLES.alloc_tensor_by_stealing_from_void_ptr(ctypes.pythonapi.PyCapsule_New(made, None, None))


def handle(tensor: Tensor) -> Any:
    """A handle of a tensor; it stays valid for as long as the process, which is long enough for a test."""
    (capsule,) = HANDLES.unsafe_alloc_void_ptrs_from_tensors([tensor])
    return ctypes.c_void_p(ctypes.pythonapi.PyCapsule_GetPointer(capsule, None))
