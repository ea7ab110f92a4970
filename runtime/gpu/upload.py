"""Weights to a GPU: mapped files are read into pinned memory in pieces, one piece while the one before it travels.

Tensors on the CPU come in, their copies on the device go out, complete. Memory that is not pinned would be copied twice, and
the disk would wait for the bus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20
BUFFER_COUNT = 2


class UploadLane(Protocol):
    """What pieces travel on. `send` returns at once, `wait` when what was sent under that ticket has arrived."""

    def buffer(self, count: int) -> Tensor: ...

    def send(self, target: Tensor, source: Tensor) -> Any: ...

    def wait(self, ticket: Any) -> None: ...


class CudaUploadLane:
    """A stream of its own, behind all that the caller's stream has been asked for so far: its memory may have been in use."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def buffer(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def send(self, target: Tensor, source: Tensor) -> Any:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, ticket: Any) -> None:
        ticket.synchronize()


def upload_tensors(
    tensors: Mapping[str, Tensor], device: torch.device, lane: UploadLane | None = None, piece_bytes: int = PIECE_BYTES
) -> dict[str, Tensor]:
    """The contiguous tensors by the same keys, on the device."""
    lane = lane or CudaUploadLane(device)
    free = [lane.buffer(piece_bytes) for _ in range(BUFFER_COUNT)]
    travelling: deque[tuple[Any, Tensor]] = deque()
    there = {key: torch.empty_like(tensor, device=device) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not tensor.numel():
            continue
        pieces = zip(byte_view(tensor).split(piece_bytes), byte_view(there[key]).split(piece_bytes), strict=True)
        for source, target in pieces:
            if not free:
                ticket, buffer = travelling.popleft()
                lane.wait(ticket)
                free.append(buffer)
            buffer = free.pop()
            piece = buffer[: source.numel()].copy_(source)
            travelling.append((lane.send(target, piece), buffer))
    for ticket, _ in travelling:
        lane.wait(ticket)
    return there


def move_to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors where the device is the CPU, and copies on any other device."""
    return dict(tensors) if device.type == "cpu" else upload_tensors(tensors, device)


def byte_view(tensor: Tensor) -> Tensor:
    """The tensor's own memory, [nbytes]."""
    return tensor.reshape(-1).view(torch.uint8)
