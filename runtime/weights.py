"""The weights, mapped into memory once, and for a GPU copied there once; every graph of an artifact is bound to these same tensors.

Pages are read from disk when a kernel first touches them and belong to the page cache, so a second variant, or a second
process on the same artifact, adds no memory for weights.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import ArtifactError
from .gpu.upload import move_to_device

Tensors = dict[str, torch.Tensor]


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
            with safe_open(where, framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is not iterable)
                    if key in tensors:
                        raise ArtifactError(f"{path}: key {key!r} is in another weight file too; export again")
                    tensors[key] = file.get_tensor(key)
        except (SafetensorError, OSError) as e:
            raise ArtifactError(f"{path}: expected safetensors, but {e}; restore the file or export again") from e
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


def refuse_unmappable(file: Path) -> None:
    """Raises OSError where there is no room to map the file twice, as safetensors and torch will: where torch (2.13) cannot,
    it forgets to close the file."""
    with file.open("rb") as opened:
        if os.fstat(opened.fileno()).st_size:
            with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ), mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ):
                pass
