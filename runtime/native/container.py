"""A compiled model by its C functions (`torch/csrc/inductor/aoti_runtime/interface.h`), called without Python's lock.

torch's own Python runner, `AOTIModelContainerRunnerCpu`, holds that lock while a model runs
(https://github.com/pytorch/pytorch/issues/197516), so that one evaluation stops every thread of a server. A foreign call by
ctypes does not, and the library's functions are plain C. Tensors become the handles that they take, and back, by the same
functions of torch that Inductor's own wrappers use.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError
from ..private_torch import make_handles, take_tensors
from ..process.fork import tell_of_forks

BIND_FUNCTION = "UpdateUserManagedConstantBufferPairs"
"""Without it a library is older than torch 2.11, and is run by torch's runner."""

CONSTANT_ALIGNMENT_BYTES = 64  # of a constant's bytes, AOTI_CONST_ALIGNMENT


class ConstantEntry(Structure):
    """AOTInductorConstantMapEntry."""

    _fields_ = (("name", c_char_p), ("handle", c_void_p))


ARGUMENT_TYPES: dict[str, tuple[Any, ...]] = {
    "CreateWithDevice": (POINTER(c_void_p), c_size_t, c_char_p, c_char_p),
    "Delete": (c_void_p,),
    "GetNumInputs": (c_void_p, POINTER(c_size_t)),
    "GetNumOutputs": (c_void_p, POINTER(c_size_t)),
    "GetNumConstants": (c_void_p, POINTER(c_size_t)),
    "GetConstantOriginalFQN": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetConstantDataSize": (c_void_p, c_size_t, POINTER(c_size_t)),
    BIND_FUNCTION: (c_void_p, POINTER(ConstantEntry), c_size_t, c_bool, c_bool),
    "Run": (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p),
    "RunSingleThreaded": (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p),
}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = c_void_p, (ctypes.py_object, c_char_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (c_void_p, c_char_p, c_void_p)


class Container:
    """`runners` instances of the model in one library, over one set of constants: so many calls may be inside at once,
    and others wait. The library's own way to wait is not used: a call that fails there wakes nobody.

    On a GPU a call is queued on the caller's stream, and returns before it is done. A single instance is run without the
    events by which the library would tell that it is idle: a stream that is being recorded cannot be asked for them."""

    def __init__(self, name: str, library: ctypes.CDLL, runners: int, device: torch.device):
        self._name, self._device = name, device
        self._run = "RunSingleThreaded" if device.type == "cuda" and runners == 1 else "Run"
        self._functions = {short: library_function(library, short, types) for short, types in ARGUMENT_TYPES.items()}
        self._last_error = getattr(library, "AOTInductorGetLastError", None)  # not in torch 2.11
        if self._last_error:
            self._last_error.restype, self._last_error.argtypes = c_int, (POINTER(c_char_p),)
        self._runners = runners
        self._free = threading.BoundedSemaphore(runners)
        tell_of_forks(self)
        self._handle = c_void_p()
        self._call("CreateWithDevice", byref(self._handle), runners, str(device).encode(), None)
        self._constants: list[Any] = []
        freed = weakref.finalize(self, free_container, self._functions["Delete"], self._handle, self._constants)
        freed.atexit = False  # a thread may still be inside
        self.inputs, self.outputs = self._count("GetNumInputs"), self._count("GetNumOutputs")

    def after_fork(self) -> None:
        """Whoever was inside is not in this process."""
        self._free = threading.BoundedSemaphore(self._runners)

    def constant_bytes(self) -> dict[str, int]:
        """Constant, by its name in the model -> how many bytes the code was compiled for, on the CPU rounded up to `CONSTANT_ALIGNMENT_BYTES`."""
        sizes = {}
        for i in range(self._count("GetNumConstants")):
            name, size = c_char_p(), c_size_t()
            self._call("GetConstantOriginalFQN", self._handle, i, byref(name))
            self._call("GetConstantDataSize", self._handle, i, byref(size))
            sizes[(name.value or b"").decode()] = size.value
        return sizes

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Points every constant, by its name in the library, at the tensor. Nothing is copied.

        torch 2.13 takes a reference of its own to each and never gives it back (`MaybeOwningAtenTensorHandle`): a mapped file
        stays mapped as long as the process lives, though its pages may leave memory. To bind again costs as little as that.
        """
        before, fresh = list(self._constants), make_handles(list(tensors.values()))
        self._constants += fresh
        entries = [
            ConstantEntry(name.encode(), _capsule_pointer(c, None)) for name, c in zip(tensors, fresh, strict=True)
        ]
        self._call(BIND_FUNCTION, self._handle, (ConstantEntry * len(entries))(*entries), len(entries), False, True)
        self._constants[:] = fresh  # in place: it is what `free_container` will free
        take_tensors(before)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The model's outputs, freshly allocated."""
        capsules = make_handles(inputs)  # the model frees what they point at
        given = (c_void_p * len(capsules))(*[_capsule_pointer(c, None) for c in capsules])
        made = (c_void_p * self.outputs)()
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else None
        with self._free:
            self._call(self._run, self._handle, given, len(given), made, len(made), stream, None)
        return take_tensors([_new_capsule(h, None, None) for h in made])

    def _call(self, short: str, *arguments: Any) -> None:
        if self._functions[short](*arguments):
            said = c_char_p()
            if self._last_error:
                self._last_error(byref(said))
            why = (said.value or b"it does not say why").decode(errors="replace").strip().splitlines()[0]
            raise ArtifactError(f"graph {self._name!r}: its compiled code failed in {short}: {why}")

    def _count(self, short: str) -> int:
        count = c_size_t()
        self._call(short, self._handle, byref(count))
        return count.value


def open_container(name: str, so: Path, runners: int, device: torch.device) -> Container | None:
    """The library, opened; None where only torch's own runner can run it: it is older than `BIND_FUNCTION`, or calls operators
    by way of torch's dispatcher, which are listed in a file beside it."""
    library = ctypes.CDLL(str(so))
    if so.with_suffix(".json").exists() or not hasattr(library, f"AOTInductorModelContainer{BIND_FUNCTION}"):
        return None
    return Container(name, library, runners, device)


def library_function(library: ctypes.CDLL, short: str, arguments: tuple[Any, ...]) -> Any:
    found = library[f"AOTInductorModelContainer{short}"]
    found.restype, found.argtypes = c_int, arguments
    return found


def free_container(delete: Any, handle: c_void_p, constants: list[Any]) -> None:
    """Frees the instances, and then the constants' handles, which the library only borrowed."""
    delete(handle)
    take_tensors(constants)
