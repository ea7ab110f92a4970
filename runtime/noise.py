"""Noise: the numbers that diffusers draws from the same generators, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .call.arguments import describe_argument, whole_number
from .errors import RequestError

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the whole batch, one for each image, or torch's global one."""
SEEDS = range(-(2**63), 2**64)  # what torch takes


def draw_noise(shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
    """diffusers' randn_tensor, float32 [B, ...]: one generator draws the whole batch, of a list each draws its image."""
    if isinstance(generator, torch.Generator) or generator is None:
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    if len(generator) == 1:
        return draw_noise(shape, generator[0])
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=torch.float32) for g in generator])


def choose_generators(seed: int | None, generator: Generators, batch: int) -> Generators:
    """The generators of a call for `batch` images. Raises RequestError for what does not fit it."""
    if seed is not None:
        if generator is not None:
            raise RequestError("expected seed or generator, got both")
        return torch.Generator().manual_seed(seed_number(seed))
    if generator is None:
        return None
    given: Any = generator
    each = list(given) if isinstance(given, list | tuple) else [given]
    if other := [g for g in each if not isinstance(g, torch.Generator)]:
        raise RequestError(
            f"generator: expected a torch.Generator, or a list of them, got {describe_argument(other[0])}; a number is seed's"
        )
    if not isinstance(generator, torch.Generator) and len(each) != batch:
        raise RequestError(f"generator: expected one, or a list of {batch}, one for each image; got {len(each)}")
    if other := [g.device for g in each if g.device.type != "cpu"]:
        raise RequestError(f"generator: expected a generator on the cpu, where noise is drawn, got one on {other[0]}")
    return generator


def seed_number(seed: Any) -> int:
    """The seed as torch takes it. Raises RequestError for what is no whole number, or beyond 64 bits."""
    number = whole_number("seed", seed)
    if number not in SEEDS:
        raise RequestError(f"seed={number}: expected a whole number of 64 bits, {SEEDS[0]} to {SEEDS[-1]}")
    return number
