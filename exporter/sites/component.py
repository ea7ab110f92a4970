"""A component: a module that becomes a graph (or, for the denoiser, several), with flat named tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Component:
    """A module to be captured: positional `args` named by `inputs`, a tuple of tensors named by `outputs` returned.

    `branches` says of a denoiser where the diffusers model lies in it, as a path prefix: `{"": "transformer."}`, and with
    classifier-free guidance one for each branch, `{"uncond": "uncond.unet.", "cond": "cond.unet."}`.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    args: tuple[Tensor, ...]
    branches: Mapping[str, str] = field(default_factory=lambda: {"": ""})
