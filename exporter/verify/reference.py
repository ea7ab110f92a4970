"""Reference: the float32 diffusers pipeline that an artifact was made of, as diffusers runs it.

It draws the pictures that the artifact is held against, and evaluates its denoiser at the artifact's own inputs.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from ...runtime.manifest import Manifest, size_graph_name
from ..families.picture import read_sizes
from ..families.registry import Family
from ..recipe.schema import Guidance
from .replayer import DrawnPicture, GraphCall


class EagerReference(Protocol):
    """What an artifact is held against: `Reference`, or `AttachedReference`."""

    @property
    def scheduler(self) -> str: ...
    def draw(self, prompt: str, seed: int, steps: int) -> DrawnPicture: ...
    def evaluate(self, call: GraphCall) -> tuple[Tensor, float]: ...


class Reference:
    """The pipeline as diffusers runs it: float32, nothing fused, quantized, cached or compiled. `family` is its exporter module,
    `guidance` the recipe's table."""

    def __init__(self, pipe: Any, family: Family, manifest: Manifest, guidance: Guidance) -> None:
        self._pipe, self._family = pipe, family
        self._sizes, self._guidance_scale = read_sizes(manifest), manifest.defaults.guidance_scale
        build = family.range_denoiser if manifest.range else family.denoiser
        self._denoisers = {size_graph_name("", name): build(pipe, size, guidance) for name, size in self._sizes.items()}

    @property
    def scheduler(self) -> str:
        """The class, as a plan names it."""
        return type(self._pipe.scheduler).__name__

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, steps: int) -> DrawnPicture:
        start = time.perf_counter()
        latents, image = self._family.draw(self._pipe, prompt, seed, steps, self._guidance_scale, self._sizes[None])
        return DrawnPicture(image, latents, time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self, call: GraphCall) -> tuple[Tensor, float]:
        """The denoiser's output at this call's inputs (the artifact's own, so errors do not add up), and its milliseconds."""
        denoiser = self._denoisers[call.graph.removeprefix(call.graph.partition(".")[0])]
        given = (call.inputs[name] for name in denoiser.inputs)
        args = [t.float() if t.is_floating_point() else t for t in given]
        start = time.perf_counter()
        sample = denoiser.module(*args)
        return sample, (time.perf_counter() - start) * 1e3
