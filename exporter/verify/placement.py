"""Placement: where the reference runs, and in what. A GPU's artifact is held against eager on a GPU.

Where all of a pipeline does not fit into the GPU's memory, diffusers moves one component at a time there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...runtime.errors import RecipeError
from ..recipe.resolve import Recipe

ROOM_FOR_ACTIVATIONS = 1.2  # of the weights


def reference_device(recipe: Recipe) -> torch.device:
    """Where eager runs. Raises RecipeError where torch has no such device here."""
    asked = recipe.verify.reference.device
    name = asked or recipe.compile.device
    if name == "cuda" and not torch.cuda.is_available():
        key = "verify.reference" if asked else "compile.device"
        raise RecipeError(
            f"{key}: the pipeline that the artifact is held against runs on device 'cuda', and torch sees no GPU here; "
            "set verify.reference='{device = \"cpu\"}', or verify on a machine with one"
        )
    return torch.device(name)


def reference_dtype(recipe: Recipe) -> torch.dtype:
    """What eager computes in."""
    return getattr(torch, recipe.verify.reference.dtype)


def place_pipeline(pipe: Any, device: torch.device) -> bool:
    """Moves the pipeline to the device, whole or, where that does not fit, a component at a time. Whether it is whole there."""
    if device.type == "cpu":
        return True
    whole = weights_bytes(pipe) * ROOM_FOR_ACTIVATIONS <= free_bytes(device)
    if whole:
        pipe.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)
    return whole


def weights_bytes(pipe: Any) -> int:
    """What the weights of all components take, as they are."""
    modules = [component for component in pipe.components.values() if isinstance(component, nn.Module)]
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
