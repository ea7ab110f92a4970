"""The weights, mapped into memory once, and for a GPU copied there once; every graph of an artifact is bound to these same tensors.

Pages are read from disk when a kernel first touches them and belong to the page cache, so a second variant, or a second
process on the same artifact, adds no memory for weights.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import ArtifactError
from .gpu.upload import move_to_device

Tensors = dict[str, torch.Tensor]
LENGTH_BYTES = 8  # in which a safetensors file says how long its header is
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""safetensors' names."""


def map_weights(
    files: Mapping[Path, Path],
    device: torch.device,
    channels_last: Collection[str] = (),
    complex: Collection[str] = (),
    to_device: Callable[[Tensors], Tensors] | None = None,
) -> Tensors:
    """Key -> tensor over all files: mapped on the CPU, copied once to any other device, by `to_device` where there is one.

    `files` are their names, for messages, and where to open them: a checked file by its descriptor (`files.descriptor_path`).

    Keys in `channels_last` are stored [N, H, W, C] and come out as [N, C, H, W] views, with the strides that compiled
    code expects; keys in `complex` are stored [..., 2] and come out as complex numbers [...]. Raises ArtifactError for a file that is not safetensors and for a key that occurs twice.
    """
    tensors: Tensors = {}
    for path, where in files.items():
        try:
            refuse_unmappable(where)
            fresh = map_file(where)
        except (SafetensorError, OSError) as e:
            raise ArtifactError(f"{path}: expected safetensors, but {e}; restore the file or export again") from e
        if twice := sorted(fresh.keys() & tensors.keys()):
            raise ArtifactError(f"{path}: key {twice[0]!r} is in another weight file too; export again")
        tensors |= fresh
    tensors = to_device(tensors) if to_device else move_to_device(tensors, device)
    for key in channels_last:
        if key not in tensors or tensors[key].dim() != 4:
            raise ArtifactError(
                f"manifest.json [channels_last]: {key!r} is not a stored tensor [N, H, W, C]; export again"
            )
        tensors[key] = tensors[key].permute(0, 3, 1, 2)
    for key in complex:
        if key not in tensors or tensors[key].shape[-1:] != (2,) or not tensors[key].is_floating_point():
            raise ArtifactError(f"manifest.json [complex]: {key!r} is not a stored tensor [..., 2]; export again")
        tensors[key] = torch.view_as_complex(tensors[key])
    return tensors


def map_file(file: Path) -> Tensors:
    """The tensors of one safetensors file, views of one private mapping of it. Raises SafetensorError for what is no such file.

    safetensors checks the header. Its own `get_tensor` (0.8) keeps two Python numbers for each tensor for ever, 60 bytes, which a
    process that loads again and again would not get back.
    """
    with safe_open(file, framework="pt", device="cpu"), file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        header = json.loads(opened.read(header_bytes))
        size = os.fstat(opened.fileno()).st_size
    data: Any = torch.UntypedStorage.from_file(str(file), False, size)[LENGTH_BYTES + header_bytes :]
    return {name: view_bytes(data, name, said) for name, said in header.items() if name != "__metadata__"}


def view_bytes(data: torch.UntypedStorage, name: str, said: Mapping[str, Any]) -> torch.Tensor:
    """The tensor of which the header has `said` dtype, shape and place, in the bytes that follow it. What else it says means nothing."""
    if said["dtype"] not in DTYPES:
        raise SafetensorError(f"{name!r} is of {said['dtype']}, which no artifact has")
    begin, end = said["data_offsets"]
    return torch.empty(0, dtype=DTYPES[said["dtype"]]).set_(data[begin:end]).view(said["shape"])


def refuse_unmappable(file: Path) -> None:
    """Raises OSError where there is no room to map the file twice, as safetensors and torch will: where torch (2.13) cannot,
    it forgets to close the file."""
    with file.open("rb") as opened:
        if os.fstat(opened.fileno()).st_size:
            with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ), mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ):
                pass
