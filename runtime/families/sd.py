"""What a Stable Diffusion pipeline needs around the loop: its settings in the manifest, and prompts in pairs.

`exporter/families/sd.py` writes `manifest.pipeline` by the `Settings` below. Both branches of classifier-free guidance
are in the denoiser's graph, which takes the two prompts' states as [2, L, D], the negative one first, as diffusers
stacks them. Letters: B images, L tokens of text, h and w of the latents.
"""

from __future__ import annotations

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
    """`manifest.pipeline` of family `sd`. `latents_shape` is [C, h, w]; `timestep_scale` times a plan's timestep is the
    denoiser's."""

    model_config = FROZEN
    latents_shape: tuple[int, int, int]
    timestep_scale: float
    prompts: tuple[Prompt]


class StableDiffusion:
    """Family `sd`: one encoder, latents as the VAE has them, guidance between two prompts."""

    arguments = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds")
    latents_name = "latents"

    def __init__(self, artifact: Artifact):
        self.settings = read_settings(Settings, artifact)
        self.latents_shape: tuple[int, ...] = self.settings.latents_shape
        self.max_sequence_length = self.settings.prompts[0].max_length
        self._device = artifact.device
        self._encoder = TextEncoder(artifact, self.settings.prompts[0])

    def draw_latents(self, batch: int, generator: Generators) -> torch.Tensor:
        """float32 [B, C, h, w]."""
        return draw((batch, *self.latents_shape), generator)

    def conditions(self, given: Mapping[str, Any], guidance_scale: float) -> list[Tensors]:
        """The states of both prompts [2, L, D] and the guidance [1].

        At a guidance of 1 or less diffusers runs one branch, the prompt's, and ignores the negative prompt. The graph has
        both all the same: here they get the prompt, and `u + 1 (c - u)` of equal u and c is c. That takes as long as
        any other guidance.
        """
        encoded: dict[str, torch.Tensor] = {}
        prompts = self._embeddings(given, "prompt", None, encoded)
        negatives = prompts
        if guidance_scale > 1:
            negatives = self._embeddings(given, "negative_prompt", "", encoded)
            if len(negatives) not in (1, len(prompts)):
                raise ArtifactError(
                    f"negative_prompt: expected one, or {len(prompts)}, one for each prompt; got {len(negatives)}"
                )
            negatives = negatives * (len(prompts) // len(negatives))
        guidance = torch.full([1], max(guidance_scale, 1.0), dtype=torch.float32, device=self._device)
        return [
            {self._encoder.output: torch.cat(pair), "guidance": guidance}
            for pair in zip(negatives, prompts, strict=True)
        ]

    def _embeddings(
        self, given: Mapping[str, Any], name: str, default: str | None, encoded: dict[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """The states [1, L, D] of the texts `name`, or of `<name>_embeds`. `encoded` keeps each text's, for this call."""
        if f"{name}_embeds" in given:
            if name in given:
                raise ArtifactError(f"expected either {name} or {name}_embeds, got both")
            embeddings, shape = given[f"{name}_embeds"], self._encoder.shape
            if tuple(embeddings.shape[1:]) != shape[1:]:
                raise ArtifactError(
                    f"{name}_embeds: expected [B, {shape[1]}, {shape[2]}], got {list(embeddings.shape)}"
                )
            return list(self._encoder.given(embeddings))
        each = texts(name, given.get(name, default))
        for text in each:
            if text not in encoded:
                encoded[text] = self._encoder(text)
        return [encoded[text] for text in each]
