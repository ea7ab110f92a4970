"""The memory that a picture needs between two evaluations, known before it begins: every size of it is in the manifest."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch

from ..contract import torch_dtype
from ..drawing.request import Request
from ..manifest import STEP, Manifest, TensorSpec
from ..replay import history_depth

SHARE = 4
"""An engine's jobs may hold one part in so many of the device's memory, unless it is told another number of bytes."""


def default_budget(device: torch.device) -> int:
    """Bytes for all jobs that have begun, on that device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // SHARE
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // SHARE


def picture_bytes(manifest: Manifest, request: Request) -> int:
    """Bytes of one picture: its latents and the plan's history of them, its draws, what the denoiser is given beside them, and all
    generations of every site that its plan stores. Activations are a runner's, not a picture's."""
    plan = request.plan
    size = request.family.height, request.family.width
    graphs = [manifest.graph(name).at(*size) for name in dict.fromkeys(e.variant for e in plan.evaluations)]
    latents = 4 * math.prod(request.family.latents_shape)
    draws = sum(bool(e.update.noise) for e in plan.evaluations)
    masked = 0 if request.start.mask_image is None else 3  # the picture, its noise and the mask
    inputs = {spec.name: spec for graph in graphs for spec in graph.inputs if "@" not in spec.name}
    given = sum(spec_bytes(spec, len(plan.evaluations) if is_step_value(name) else 1) for name, spec in inputs.items())
    stored = {name for graph in graphs for name in graph.stores}
    return latents * (2 + 2 * history_depth(plan) + draws + masked) + given + stored_bytes(manifest, stored, request)


def stored_bytes(manifest: Manifest, names: Iterable[str], request: Request) -> int:
    """Bytes of all generations of those sites."""
    variants = {e.variant for e in request.plan.evaluations}
    size = request.family.height, request.family.width
    outputs = {s.name: s for graph in manifest.graphs if graph.name in variants for s in graph.at(*size).outputs}
    kept = set(names)
    return sum(
        site.slots * spec_bytes(outputs[t]) for site in manifest.sites if site.name in kept for t in site.tensors
    )


def is_step_value(name: str) -> bool:
    """Whether it was computed before the loop, once for each evaluation."""
    return name.startswith(f"{STEP}:")


def spec_bytes(spec: TensorSpec, count: int = 1) -> int:
    return count * math.prod(spec.shape) * torch_dtype(spec.dtype).itemsize
