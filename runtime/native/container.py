"""A compiled model by its C functions (`torch/csrc/inductor/aoti_runtime/interface.h`), called without Python's lock.

torch's own Python runner, `AOTIModelContainerRunnerCpu`, holds that lock while a model runs
(https://github.com/pytorch/pytorch/issues/197516), so that one evaluation stops every thread of a server. A foreign call by
ctypes does not, and the library's functions are plain C. Tensors become the handles that they take, and back, by the same
functions of torch that Inductor's own wrappers use.
"""

from __future__ import annotations

import _ctypes
import ctypes
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ArtifactError
from ..memory import require_room
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
    "GetConstantName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetConstantOriginalFQN": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetConstantDtype": (c_void_p, c_size_t, POINTER(c_int32)),
    "GetConstantDataSize": (c_void_p, c_size_t, POINTER(c_size_t)),
    BIND_FUNCTION: (c_void_p, POINTER(ConstantEntry), c_size_t, c_bool, c_bool),
    "Run": (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p),
    "RunSingleThreaded": (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p),
}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = c_void_p, (ctypes.py_object, c_char_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (c_void_p, c_char_p, c_void_p)


class CompiledConstant(NamedTuple):
    """A constant in a library: its name there, its dtype as c10::ScalarType, and its bytes, on the CPU rounded up to
    `CONSTANT_ALIGNMENT_BYTES`; None where they are not known."""

    name: str
    dtype: int
    nbytes: int | None


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
        self._shown: dict[str, torch.Tensor] = {}
        self._unload = weakref.finalize(self, _ctypes.dlclose, library._handle)  # of two, the later one is called first
        self._free_all = weakref.finalize(
            self, free_container, self._functions["Delete"], self._handle, self._constants, self._shown
        )
        self._unload.atexit = self._free_all.atexit = False  # a thread may still be inside
        self.inputs, self.outputs = self._count("GetNumInputs"), self._count("GetNumOutputs")

    def after_fork(self) -> None:
        """Whoever was inside is not in this process."""
        self._free = threading.BoundedSemaphore(self._runners)

    def close(self) -> None:
        """Frees the instances and the constants. Nobody is inside, and nobody comes after it."""
        self._free_all()

    def unload(self) -> None:
        """Closes the library, which the linker unmaps if all threads have ended that were in it, `close` included: each has a
        variable there whose destructor is in the library. Otherwise a later `unload`, of any library, does it."""
        self._unload()

    def constants(self) -> dict[str, CompiledConstant]:
        """Constant, by its name in the model -> what the code was compiled for."""
        found = {}
        for i in range(self._count("GetNumConstants")):
            name, fqn, dtype, size = c_char_p(), c_char_p(), c_int32(), c_size_t()
            self._call("GetConstantName", self._handle, i, byref(name))
            self._call("GetConstantOriginalFQN", self._handle, i, byref(fqn))
            self._call("GetConstantDtype", self._handle, i, byref(dtype))
            self._call("GetConstantDataSize", self._handle, i, byref(size))
            found[(fqn.value or b"").decode()] = CompiledConstant((name.value or b"").decode(), dtype.value, size.value)
        return found

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Points every constant, by its name in the library, at the tensor. Nothing is copied.

        torch 2.13 takes a reference of its own to each and never gives it back (`MaybeOwningAtenTensorHandle`). So it gets
        tensors made for it, which are emptied when they are not needed any more: some hundred bytes for each constant stay.
        """
        emptied = show_tensors(self._shown, tensors)
        before, fresh = list(self._constants), make_handles([self._shown[name] for name in tensors])
        self._constants += fresh
        entries = [
            ConstantEntry(name.encode(), _capsule_pointer(c, None)) for name, c in zip(tensors, fresh, strict=True)
        ]
        self._call(BIND_FUNCTION, self._handle, (ConstantEntry * len(entries))(*entries), len(entries), False, True)
        self._constants[:] = fresh  # in place: it is what `free_container` will free
        take_tensors(before)
        empty_tensors(emptied)

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
    by way of torch's dispatcher, which are listed in a file beside it. Raises RuntimeError for what the linker does not open."""
    require_room()
    try:
        library = ctypes.CDLL(str(so))
    except OSError as e:
        raise RuntimeError(str(e)) from e
    if so.with_suffix(".json").exists() or not hasattr(library, f"AOTInductorModelContainer{BIND_FUNCTION}"):
        return None
    return Container(name, library, runners, device)


def library_function(library: ctypes.CDLL, short: str, arguments: tuple[Any, ...]) -> Any:
    found = library[f"AOTInductorModelContainer{short}"]
    found.restype, found.argtypes = c_int, arguments
    return found


def free_container(delete: Any, handle: c_void_p, constants: list[Any], shown: dict[str, torch.Tensor]) -> None:
    """Frees the instances, then the constants' handles, which the library only borrowed, and the memory behind them."""
    delete(handle)
    take_tensors(constants)
    empty_tensors(shown.values())


def show_tensors(shown: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Puts a tensor of the same memory as each of `tensors` into `shown`, and gives those that it takes the place of. One that
    shows the same already stays."""
    replaced = []
    for name, tensor in tensors.items():
        if (before := shown.get(name)) is not None:
            if before.is_set_to(tensor):
                continue
            replaced.append(before)
        shown[name] = show_memory(tensor)
    return replaced


_spare: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
"""Tensors that were emptied. torch holds them for the life of the process, so they are used again: a process that loads one artifact
after the other needs no more of them than it ever had at once."""


def show_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same memory that can be emptied later: a spare one where there is one."""
    try:
        spare = _spare[tensor.dtype, tensor.device].pop()
    except (KeyError, IndexError):
        return tensor.detach()
    with torch.no_grad():
        return spare.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def empty_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Lets go of what they show, for everybody who holds them, and keeps them for `show_memory`."""
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.numel() and not tensor.untyped_storage().nbytes():
                continue  # emptied before
            tensor.set_(tensor.new_empty(0).untyped_storage())
            if not tensor.is_inference():
                _spare.setdefault((tensor.dtype, tensor.device), []).append(tensor)
