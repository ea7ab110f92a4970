"""Offload: weights of graphs that run once for a prompt lie in pinned memory of the host, and on the GPU while they run.

Tensors on the CPU come in, tensors on the device go out, whose memory is there between `arrive` and `leave` and else is
not: their storage is emptied, and filled again. Compiled code keeps addresses, so its constants are bound anew when the
memory came back elsewhere. What stays on the device, the denoiser and the decoder, never passes through here.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .backends import backend_module
from .errors import ArtifactError, RequestError, first_line
from .gpu.upload import PIECE_BYTES, byte_view, move_to_device
from .manifest import Manifest, batch_graph_name, size_graph_name

ALLOCATION_ALIGNMENT_BYTES = 512
"""Bytes, where torch's own allocations on a GPU begin."""
OffloadRequest = bool | Sequence[str]
"""`load(offload=...)`: names of graphs, or all that can leave."""
DECODER_GRAPH = "vae_decoder"


class OffloadDevice(Protocol):
    """Where weights visit. `send` is queued, and `sent` a ticket for all of it; `join` lets what the caller queues from now on
    wait for it, and keeps `memory` from other uses until that is done. `freed` is called when memory was let go of."""

    def pinned(self, count: int) -> Tensor: ...

    def send(self, target: Tensor, source: Tensor) -> None: ...

    def sent(self) -> Any: ...

    def join(self, ticket: Any, memory: Tensor) -> None: ...

    def freed(self) -> None: ...


class CudaOffloadDevice:
    """Copies on the caller's stream. Memory goes back to the driver, as in diffusers' offloading: a block of that size that
    torch kept for itself would be split by the next small allocation that stays, and not fit the next time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def send(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def sent(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def join(self, ticket: Any, memory: Tensor) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ticket)
        memory.record_stream(stream)

    def freed(self) -> None:
        torch.cuda.empty_cache()


# --- what may leave ---------------------------------------------------------------------------------------------------


def offloaded_graphs(asked: OffloadRequest, manifest: Manifest, variants: Collection[str]) -> tuple[str, ...]:
    """The graphs whose weights leave, in the manifest's order; `variants` are the denoiser's. Raises RequestError where that
    means nothing, and for graphs that stay."""
    if not asked:
        return ()
    listed = isinstance(asked, list | tuple) and all(isinstance(name, str) for name in asked)
    if asked is not True and not listed:
        raise RequestError(f"offload={asked!r}: expected True, or a list of graphs such as ['text_encoder']")
    if manifest.requires.device != "cuda":
        raise RequestError(
            f"offload={asked!r}: the artifact is for the CPU, where weights are pages of their files already, which leave memory "
            "when it is needed; leave it out"
        )
    if not getattr(backend_module(manifest.backend), "REBINDS", False):
        raise RequestError(
            f"offload={asked!r}: code of the backend {manifest.backend!r} keeps its weights to itself; leave it out, or export "
            "with compile.backend=aoti"
        )
    able = offloadable_graphs(manifest, variants)
    if asked is True:
        return able
    if staying := [name for name in asked if name not in able]:
        raise RequestError(
            f"offload={asked!r}: {staying[0]!r} is not among the graphs that run once for a prompt: {', '.join(able) or 'none'}; "
            "denoiser and decoder stay on the device"
        )
    return tuple(name for name in able if name in asked)


def offloadable_graphs(manifest: Manifest, variants: Collection[str]) -> tuple[str, ...]:
    """The graphs that are neither of the denoiser's nor the decoder."""
    denoisers = {batch_graph_name(name, batch) for name in variants for batch in manifest.batches}
    decoders = {size_graph_name(DECODER_GRAPH, size) for size in (None, *(entry.name for entry in manifest.sizes))}
    return tuple(g.name for g in manifest.graphs if g.name not in denoisers | decoders)


def owned_weights(manifest: Manifest, graphs: Sequence[str]) -> dict[str, dict[str, None]]:
    """Graph -> keys of the weights that are moved with it, in order, each once; none that a graph which stays reads too."""
    keys = {g.name: dict.fromkeys(g.constants.values()) for g in manifest.graphs}
    taken = {key for name, own in keys.items() if name not in graphs for key in own}
    owned: dict[str, dict[str, None]] = {}
    for name in graphs:
        owned[name] = {key: None for key in keys[name] if key not in taken}
        taken |= owned[name].keys()
    return owned


def pack_offsets(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Offset in bytes of each tensor in one aligned block of memory, and the block's length."""
    at, offsets = 0, {}
    for key, tensor in tensors.items():
        offsets[key] = at
        at += -(-tensor.nbytes // ALLOCATION_ALIGNMENT_BYTES) * ALLOCATION_ALIGNMENT_BYTES
    return offsets, at


# --- coming and going -------------------------------------------------------------------------------------------------


class OffloadedGroup:
    """Contiguous tensors, kept in pinned memory, and `tensors`, their places on the device. Any number of threads may need
    them at once: the first brings them, the last lets them go. A new one has its memory, for views that can be made of
    tensors only then, until `leave`."""

    def __init__(
        self, tensors: Mapping[str, Tensor], where: torch.device, device: OffloadDevice, piece_bytes: int = PIECE_BYTES
    ):
        offsets, self.nbytes = pack_offsets(tensors)
        self._device = device
        self._pieces = pin_tensors(tensors, offsets, self.nbytes, device, piece_bytes)
        self._memory = torch.empty(self.nbytes, dtype=torch.uint8, device=where)
        self.tensors = {
            key: self._memory[offsets[key] :][: t.nbytes].view(t.dtype).reshape(t.shape) for key, t in tensors.items()
        }
        self._lock = threading.Lock()
        self._users = 0
        self._ticket: Any = None

    @property
    def address(self) -> int:
        """Address of its device memory, while it has any."""
        return self._memory.untyped_storage().data_ptr()

    @contextmanager
    def hold_resident(self) -> Iterator[None]:
        """Inside, the tensors are on the device, for what is queued on the caller's stream."""
        with self._lock:
            if not self._users:
                self._arrive()
            self._users += 1
        try:
            self._device.join(self._ticket, self._memory)
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self.leave()

    def _arrive(self) -> None:
        self._memory.untyped_storage().resize_(self.nbytes)
        try:
            for target, piece in zip(self._memory.split(len(self._pieces[0]) or 1), self._pieces, strict=True):
                self._device.send(target, piece)
            self._ticket = self._device.sent()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Gives the memory back."""
        self._memory.untyped_storage().resize_(0)
        self._device.freed()


def pin_tensors(
    tensors: Mapping[str, Tensor], offsets: Mapping[str, int], nbytes: int, device: OffloadDevice, piece_bytes: int
) -> list[Tensor]:
    """The tensors in pinned pieces of `piece_bytes`, a power of two, which is what torch would round a larger one up to.

    Raises ArtifactError where the host has not so much of it.
    """
    try:
        pieces = [device.pinned(min(piece_bytes, nbytes - at)) for at in range(0, nbytes or 1, piece_bytes)]
    except RuntimeError as e:
        raise ArtifactError(
            f"offload: {nbytes / 2**30:.1f} GiB of weights could not be pinned in the host's memory ({first_line(e)}); load "
            "without offload, or on a host with more memory"
        ) from e
    for key, tensor in tensors.items():
        at, source = offsets[key], byte_view(tensor)
        while len(source):
            piece, begin = pieces[at // piece_bytes], at % piece_bytes
            here, source = source[: len(piece) - begin], source[len(piece) - begin :]
            piece[begin : begin + len(here)].copy_(here)
            at += len(here)
    return pieces


class RebindableModel(Protocol):
    """A model whose constants can be bound again, to tensors that are at other addresses now."""

    def bind(self, tensors: Mapping[str, Tensor]) -> None: ...

    def close(self) -> None: ...

    def unload(self) -> None: ...

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]: ...


class OffloadedModel:
    """A model whose weights come for a call, and leave at the end of the `stay_on_device` that the call is in, or else after it."""

    def __init__(self, model: RebindableModel, constants: Mapping[str, Tensor], guests: Sequence[OffloadedGroup]):
        self._model, self._constants, self._guests = model, constants, guests
        self._bound: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with stay_on_device() as staying:
            for guest in self._guests:
                staying.add_group(guest)
            with self._lock:  # whoever is inside holds the guests too, so these addresses are the ones it uses
                addresses = tuple(guest.address for guest in self._guests)
                if addresses != self._bound:
                    self._model.bind(self._constants)
                    self._bound = addresses
            return self._model(inputs)

    def close(self) -> None:
        """Lets go of constants, and of the weights that are away."""
        self._model.close()
        self._guests, self._constants = (), {}

    def unload(self) -> None:
        """Lets go of the code."""
        self._model.unload()


class DeviceStay:
    """The offloaded weights that a thread keeps on the device until the end of its block."""

    def __init__(self) -> None:
        self.leaving = ExitStack()
        self._guests: list[OffloadedGroup] = []

    def add_group(self, guest: OffloadedGroup) -> None:
        if guest not in self._guests:
            self.leaving.enter_context(guest.hold_resident())
            self._guests.append(guest)


_thread_state = threading.local()


@contextmanager
def stay_on_device() -> Iterator[DeviceStay]:
    """Inside, weights that came for a call of this thread stay for its next ones; at the end they leave, whatever ended it."""
    if staying := getattr(_thread_state, "staying", None):
        yield staying
        return
    _thread_state.staying = DeviceStay()
    try:
        with _thread_state.staying.leaving:
            yield _thread_state.staying
    finally:
        _thread_state.staying = None


# --- an artifact's ------------------------------------------------------------------------------------------------------


class OffloadedWeights:
    """The offloaded weights of an artifact, grouped by the graph that they come and go with. Empty until `to_device` was called."""

    def __init__(
        self, manifest: Manifest, graphs: Sequence[str], where: torch.device, device: OffloadDevice | None = None
    ):
        self._manifest, self._graphs, self._where = manifest, graphs, where
        self._device = device or CudaOffloadDevice(where)
        self._guests: dict[str, OffloadedGroup] = {}

    def to_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights: those that stay, copied there, and then the places of those that visit, which shows that all fit."""
        owned = owned_weights(self._manifest, self._graphs)
        away = {key for keys in owned.values() for key in keys}
        there = move_to_device({key: t for key, t in tensors.items() if key not in away}, self._where)
        for name, keys in owned.items():
            if own := {key: tensors[key] for key in keys if key in tensors}:
                self._guests[name] = OffloadedGroup(own, self._where, self._device)
                there |= self._guests[name].tensors
        return there

    def leave(self) -> None:
        """Gives their memory back, once all views of it are made."""
        for guest in self._guests.values():
            guest.leave()

    def needed(self, constants: Mapping[str, str]) -> tuple[OffloadedGroup, ...]:
        """The guests that hold some of a graph's constants."""
        return tuple(g for g in self._guests.values() if any(key in g.tensors for key in constants.values()))
