"""A component: a module that becomes a graph (or, for the denoiser, several), with flat named tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...runtime.sizes.dimension import Dimension
from ...runtime.sizes.size_range import SizeRange

Axes = Mapping[int, Dimension]
"""Which dimensions of a tensor follow the picture's size, by number, and how."""


@dataclass(frozen=True)
class Component:
    """A module to be captured: positional `args` named by `inputs`, a tuple of tensors named by `outputs` returned.

    The first dimension of every input of a pipeline's denoiser counts requests: `args` are of `batch` of them. `label` is what tells its graphs from those of the same part for another call, size or batch: the end of their names.

    `branches` says of a denoiser where the diffusers model lies in it, as a path prefix: `{"": "transformer."}`, and with
    classifier-free guidance one for each branch, `{"uncond": "uncond.unet.", "cond": "cond.unet."}`.

    `range` are the sizes that its graph is for; None = the examples' alone. Then `axes` says of its inputs by name how they follow the size.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    args: tuple[Tensor, ...]
    branches: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    batch: int = 1
    label: str = ""
    range: SizeRange | None = None
    axes: Mapping[str, Axes] = field(default_factory=dict)

    def with_range(self, sizes: SizeRange, axes: Mapping[str, Axes]) -> Component:
        """The same for all those sizes, with the axes of those of its inputs that follow them."""
        return replace(self, range=sizes, axes=axes)

    def with_batch(self, batch: int, label: str) -> Component:
        """The same module, called for that many requests; the examples of no two of them are equal."""
        return replace(self, args=tuple(repeat_rows(t, batch) for t in self.args), batch=batch, label=label)


def repeat_rows(example: Tensor, batch: int) -> Tensor:
    """One row [1, ...] as [B, ...], floats of another size in each row."""
    rows = example.repeat(batch, *[1] * (example.dim() - 1))
    if not example.is_floating_point():
        return rows
    sizes = (
        torch.arange(batch, 0, -1, device=example.device) / batch
    )  # the last row's is the least, none is larger than the example's
    return (rows * sizes.view(-1, *[1] * (example.dim() - 1))).to(example.dtype)
