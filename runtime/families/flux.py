"""What a FLUX pipeline needs around the loop: its settings in the manifest, the noise, and the packed latents.

`exporter/families/flux.py` writes `manifest.pipeline` by the `Settings` below. Letters: B images, C4 latent channels,
h and w of the latents, N = hw/4 tokens of C = 4 C4 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from ..errors import ArtifactError, misfit
from ..plan import FROZEN

Generators = torch.Generator | Sequence[torch.Generator] | None


class Prompt(BaseModel):
    """One way in which the prompt enters: through a tokenizer and a graph, to the denoiser's input named `output`."""

    model_config = FROZEN
    tokenizer: str
    graph: str
    output: str
    max_length: int
    pad_id: int
    pad_token: str


class Settings(BaseModel):
    """`manifest.pipeline` of family `flux`. `latents_shape` is [C4, h, w]; `timestep_scale` times a plan's timestep is
    the denoiser's; `prompts` are in the order of diffusers' arguments `prompt` and `prompt_2`."""

    model_config = FROZEN
    latents_shape: tuple[int, int, int]
    timestep_scale: float
    guidance_embeds: bool
    prompts: tuple[Prompt, Prompt]


def read_settings(pipeline: dict[str, Any]) -> Settings:
    """The settings, checked. Raises ArtifactError naming the first field that is wrong."""
    try:
        return Settings.model_validate(pipeline)
    except ValidationError as e:
        raise ArtifactError(f"{misfit('manifest.json', e, 'pipeline')}; export again") from e


def draw_latents(shape: tuple[int, int, int], batch: int, generator: Generators) -> torch.Tensor:
    """Standard normal noise, packed: float32 [B, N, C] on the CPU, the numbers of FluxPipeline.prepare_latents."""
    return pack(draw((batch, *shape), generator))


def draw(shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
    """diffusers' randn_tensor on the CPU: one generator draws the whole batch, of a list each draws its own image."""
    if isinstance(generator, torch.Generator) or generator is None:
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    if len(generator) == 1:
        return draw(shape, generator[0])
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=torch.float32) for g in generator])


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C4, h, w] to [B, hw/4, 4 C4]: each 2 x 2 patch becomes one token (FluxPipeline._pack_latents)."""
    B, C, h, w = latents.shape
    patches = latents.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)  # [B, h/2, w/2, C4, 2, 2]
    return patches.reshape(B, (h // 2) * (w // 2), C * 4)


def packed_shape(shape: tuple[int, int, int]) -> tuple[int, int]:
    """(N, C) of latents [C4, h, w]."""
    C, h, w = shape
    return math.prod((h // 2, w // 2)), C * 4
