"""Classifier-free guidance inside the denoiser's graph: one module that runs both branches and joins them.

In: the component of one branch. Out: a component whose diffusers model occurs twice, under `uncond.` and `cond.`, with
the same parameters. Hooks, and with them sites and their stored values, therefore belong to one branch; a variant may
skip in one what it computes in the other. Guidance stays an input of the graph.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .component import Component

LOW, HIGH = "low", "high"
"""The modules in `Guided` through which the difference between the branches passes: FasterCache's two sites."""


class Guided(nn.Module):
    """`uncond + guidance (cond - uncond)`, as diffusers' pipelines compute it.

    Inputs are those of one branch; the ones in `doubled` hold both, [2, ...], the unconditional first. Last comes
    `guidance`, float32 [1]. With `planes` = (H, W), the last two dimensions of the output, the unconditional branch is
    `cond + low(d) + high(d)` of d = uncond - cond.
    """

    def __init__(
        self,
        cond: nn.Module,
        inputs: tuple[str, ...],
        doubled: tuple[str, ...],
        planes: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.cond = cond
        self.uncond = twin(cond)
        self.inputs, self.doubled = inputs, doubled
        if planes:
            self.low, self.high = LowPass(*planes), Passed()

    def forward(self, *tensors: Tensor) -> Tensor:
        *own, guidance = tensors
        halves = [
            [t.chunk(2)[k] if name in self.doubled else t for name, t in zip(self.inputs, own, strict=True)]
            for k in range(2)
        ]
        cond = self.cond(*halves[1])
        uncond = self.uncond(*halves[0])
        if hasattr(self, LOW):
            difference = uncond - cond
            low = self.low(difference)
            high = self.high(difference - low)
            uncond = cond + low + high
        return uncond + guidance * (cond - uncond)


class Passed(nn.Module):
    """Its input: a module only so that a site can name the value."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class LowPass(nn.Module):
    """The part of [..., H, W] within `min(H, W) // 5` of the zero frequency, as FasterCache splits it.

    A Fourier transform, a disc and the transform back, written as products with real matrices of cosines and sines: of
    2r + 1 frequencies a side only, and no complex numbers (diffusers hooks/faster_cache.py, `_split_low_high_freq`).
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        radius = min(height, width) // 5
        frequencies = torch.arange(-radius, radius + 1, dtype=torch.float64)
        for name, n in (("rows", height), ("columns", width)):
            angles = 2 * math.pi / n * torch.outer(torch.arange(n, dtype=torch.float64), frequencies)  # [n, 2r + 1]
            self.register_buffer(f"{name}_cos", angles.cos().float())
            self.register_buffer(f"{name}_sin", angles.sin().float())
        disc = frequencies[:, None] ** 2 + frequencies[None, :] ** 2 <= radius**2
        self.register_buffer("disc", (disc / (height * width)).float())

    def forward(self, x: Tensor) -> Tensor:
        b: Any = dict(self.named_buffers())
        rows_cos, rows_sin, columns_cos, columns_sin = (
            b[n] for n in ("rows_cos", "rows_sin", "columns_cos", "columns_sin")
        )
        c, s = x @ columns_cos, x @ columns_sin  # [..., H, K]
        real = (rows_cos.T @ c - rows_sin.T @ s) * b["disc"]  # [..., K, K]
        imaginary = (rows_sin.T @ c + rows_cos.T @ s) * b["disc"]  # of the conjugate
        left = rows_cos @ real + rows_sin @ imaginary  # [..., H, K]
        right = rows_cos @ imaginary - rows_sin @ real
        return left @ columns_cos.T + right @ columns_sin.T


def twin(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in shared})


def guided(component: Component, doubled: tuple[str, ...], *, planes: tuple[int, int] | None = None) -> Component:
    """The component of one branch with guidance around it: inputs in `doubled` become [2, ...], `guidance` is added."""
    module = Guided(component.module, component.inputs, doubled, planes).eval()
    args = tuple(
        torch.cat((-t, t)) if n in doubled else t for n, t in zip(component.inputs, component.args, strict=True)
    )
    branches = {name: f"{name}.{component.branches['']}" for name in ("uncond", "cond")}
    return Component(
        component.name,
        module,
        (*component.inputs, "guidance"),
        component.outputs,
        (*args, torch.tensor([3.0])),
        branches,
    )


def with_planes(component: Component) -> Component:
    """A guided component whose unconditional branch passes through `low` and `high`; one without guidance as it is."""
    module = component.module
    if isinstance(module, Guided) and not hasattr(module, LOW):
        module.low = LowPass(*component.args[0].shape[-2:])
        module.high = Passed()
    return component
