"""Classifier-free guidance inside the denoiser's graph: one module that runs both branches and joins them.

In: the component of one branch. Out: a component whose diffusers model occurs twice, under `uncond.` and `cond.`, with
the same parameters. Hooks, and with them sites and their stored values, therefore belong to one branch; a variant may
skip in one what it computes in the other. Or it occurs once, as `both.`, and runs on a batch of two. Guidance stays an
input of the graph.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from .component import Component

LOW, HIGH = "low", "high"
"""The modules in `GuidedDenoiser` through which the difference between the branches passes: FasterCache's two sites."""


class GuidedDenoiser(nn.Module):
    """`uncond + guidance (cond - uncond)`, as diffusers' pipelines compute it, one branch after the other.

    Inputs are those of one branch [B, ...]; the ones in `doubled` hold both, [B, 2, ...], the unconditional first. Then comes
    `guidance_scale`, float32 [B], and, where `rescale` is asked for, `guidance_rescale`, float32 [B]. With `planes` =
    (H, W), the last two dimensions of the output, the unconditional branch is `cond + low(d) + high(d)` of d = uncond - cond.
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
        self.uncond = copy_sharing_weights(cond)
        self.inputs, self.doubled = inputs, doubled
        if planes:
            self.low, self.high = LowPass(*planes), PassThrough()

    def forward(self, *tensors: Tensor) -> Tensor:
        own, scalars = tensors[: len(self.inputs)], tensors[len(self.inputs) :]
        halves = [
            [t[:, k] if name in self.doubled else t for name, t in zip(self.inputs, own, strict=True)] for k in range(2)
        ]
        cond = self.cond(*halves[1])
        uncond = self.uncond(*halves[0])
        if hasattr(self, LOW):
            difference = uncond - cond
            low = self.low(difference)
            high = self.high(difference - low)
            uncond = cond + low + high
        return join_branches(uncond, cond, *scalars)


class BatchGuidedDenoiser(nn.Module):
    """`GuidedDenoiser` in one run on [2 B, ...], a request's branches beside each other: fewer and larger products, and sites that
    hold both branches."""

    def __init__(self, both: nn.Module, inputs: tuple[str, ...], doubled: tuple[str, ...]) -> None:
        super().__init__()
        self.both = both
        self.inputs, self.doubled = inputs, doubled

    def forward(self, *tensors: Tensor) -> Tensor:
        own, scalars = tensors[: len(self.inputs)], tensors[len(self.inputs) :]
        pairs = [
            t if name in self.doubled else t.unsqueeze(1).expand(-1, 2, *t.shape[1:])
            for name, t in zip(self.inputs, own, strict=True)
        ]
        uncond, cond = self.both(*(t.flatten(0, 1) for t in pairs)).unflatten(0, (-1, 2)).unbind(1)
        return join_branches(uncond, cond, *scalars).contiguous()


def join_branches(uncond: Tensor, cond: Tensor, scale: Tensor, rescale: Tensor | None = None) -> Tensor:
    """Both branches [B, ...] as one, by numbers [B]. `rescale` mixes in the result with the deviation of `cond`, against overexposure: 0 leaves
    it as it is (Lin et al. 2023, arXiv:2305.08891, section 3.4; diffusers' `rescale_noise_cfg`)."""
    each = (-1, *[1] * (cond.dim() - 1))
    guided = uncond + scale.view(each) * (cond - uncond)
    if rescale is None:
        return guided
    rescale = rescale.view(each)
    dims = list(range(1, cond.dim()))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return rescale * (guided * ratio) + (1 - rescale) * guided


class PassThrough(nn.Module):
    """The identity: a module only so that a site can name the value."""

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


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in shared})


def add_guidance(
    component: Component,
    doubled: tuple[str, ...],
    *,
    planes: tuple[int, int] | None = None,
    batched: bool = False,
    rescale: bool = False,
) -> Component:
    """The component of one branch with guidance around it: inputs in `doubled` become [B, 2, ...], `guidance_scale` is
    added, and `guidance_rescale` if asked for. `batched` is `BatchGuidedDenoiser`, which has no planes."""
    prefix = component.branches[""]
    if batched:
        module, branches = BatchGuidedDenoiser(component.module, component.inputs, doubled), {"": f"both.{prefix}"}
    else:
        module = GuidedDenoiser(component.module, component.inputs, doubled, planes)
        branches = {name: f"{name}.{prefix}" for name in ("uncond", "cond")}
    args = tuple(
        torch.stack((-t, t) if t.is_floating_point() else (t, t), dim=1) if n in doubled else t
        for n, t in zip(component.inputs, component.args, strict=True)
    )
    scalars = {"guidance_scale": torch.tensor([3.0]), **({"guidance_rescale": torch.tensor([0.5])} if rescale else {})}
    return Component(
        component.name,
        module.eval(),
        (*component.inputs, *scalars),
        component.outputs,
        (*args, *scalars.values()),
        branches,
    )


def add_planes(component: Component) -> Component:
    """A guided component whose unconditional branch passes through `low` and `high`; one without guidance as it is.

    Raises ExportError for an output of packed tokens, which has no picture's rows and columns to split by frequency.
    """
    module = component.module
    if isinstance(module, GuidedDenoiser) and not hasattr(module, LOW):
        if component.args[0].dim() < 4:
            raise ExportError(
                "cache.method 'fastercache' splits pictures by frequency, and this denoiser's output is packed tokens "
                f"{list(component.args[0].shape)}; set cache.is_guidance_distilled=true to extrapolate attentions alone, or guidance.true_cfg=false"
            )
        module.low = LowPass(*component.args[0].shape[-2:])
        module.high = PassThrough()
    return component
