"""What a FLUX pipeline needs around the loop: its settings in the manifest, both prompts, and the packed latents.

`exporter/families/flux.py` writes `manifest.pipeline` by the `Settings` below. Letters: B images, C4 latent channels,
h and w of the latents, N = hw/4 tokens of C = 4 C4 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel

from ..artifact import Artifact
from ..errors import ArtifactError
from ..noise import Generators, draw
from ..plan import FROZEN
from ..prompts import Prompt, TextEncoder, texts
from ..replay import Tensors
from . import read_settings


class Settings(BaseModel):
    """`manifest.pipeline` of family `flux`. `latents_shape` is [C4, h, w]; `timestep_scale` times a plan's timestep is
    the denoiser's; `prompts` are in the order of diffusers' arguments `prompt` and `prompt_2`."""

    model_config = FROZEN
    latents_shape: tuple[int, int, int]
    timestep_scale: float
    guidance_embeds: bool
    prompts: tuple[Prompt, Prompt]


class Flux:
    """Family `flux`: two encoders, packed latents, guidance as an input where the model was distilled from it."""

    arguments = ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds")
    latents_name = "packed latents"

    def __init__(self, artifact: Artifact):
        self.settings = read_settings(Settings, artifact)
        self.latents_shape: tuple[int, ...] = packed_shape(self.settings.latents_shape)
        self.max_sequence_length = self.settings.prompts[1].max_length
        self._device = artifact.device
        self._encoders = [TextEncoder(artifact, prompt) for prompt in self.settings.prompts]

    def draw_latents(self, batch: int, generator: Generators) -> torch.Tensor:
        """float32 [B, N, C]."""
        return draw_latents(self.settings.latents_shape, batch, generator)

    def conditions(self, given: Mapping[str, Any], guidance_scale: float) -> list[Tensors]:
        """Pooled and unpooled text, and the guidance [1] where the model takes one."""
        guidance = {}
        if self.settings.guidance_embeds:
            guidance["guidance"] = torch.full([1], guidance_scale, dtype=torch.float32, device=self._device)
        return [{**embeddings, **guidance} for embeddings in self._embeddings(given)]

    def _embeddings(self, given: Mapping[str, Any]) -> list[Tensors]:
        if "prompt_embeds" in given or "pooled_prompt_embeds" in given:
            if set(given) != {"prompt_embeds", "pooled_prompt_embeds"}:
                raise ArtifactError("expected either prompt, or both prompt_embeds and pooled_prompt_embeds")
            return self._given_embeddings(given["prompt_embeds"], given["pooled_prompt_embeds"])
        first = texts("prompt", given.get("prompt"))
        second = texts("prompt_2", given["prompt_2"]) if "prompt_2" in given else first
        if len(first) != len(second):
            raise ArtifactError(f"prompt_2: expected {len(first)} texts, one for each prompt, got {len(second)}")
        return [
            {encode.output: encode(text) for encode, text in zip(self._encoders, pair, strict=True)}
            for pair in zip(first, second, strict=True)
        ]

    def _given_embeddings(self, prompt_embeds: torch.Tensor, pooled: torch.Tensor) -> list[Tensors]:
        if len(prompt_embeds) != len(pooled):
            raise ArtifactError(f"pooled_prompt_embeds: expected a batch of {len(prompt_embeds)}, got {len(pooled)}")
        pooling, encoding = self._encoders
        pairs = zip(pooling.given(pooled), encoding.given(prompt_embeds), strict=True)
        return [{pooling.output: one, encoding.output: other} for one, other in pairs]


def draw_latents(shape: tuple[int, int, int], batch: int, generator: Generators) -> torch.Tensor:
    """Standard normal noise, packed: float32 [B, N, C] on the CPU, the numbers of FluxPipeline.prepare_latents."""
    return pack(draw((batch, *shape), generator))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C4, h, w] to [B, hw/4, 4 C4]: each 2 x 2 patch becomes one token (FluxPipeline._pack_latents)."""
    B, C, h, w = latents.shape
    patches = latents.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)  # [B, h/2, w/2, C4, 2, 2]
    return patches.reshape(B, (h // 2) * (w // 2), C * 4)


def packed_shape(shape: tuple[int, int, int]) -> tuple[int, int]:
    """(N, C) of latents [C4, h, w]."""
    C, h, w = shape
    return math.prod((h // 2, w // 2)), C * 4
