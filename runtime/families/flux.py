"""FLUX: packed latents, guidance as an input where the model was distilled from it, and true guidance where it was asked for.

`exporter/families/flux.py` writes `manifest.pipeline`. Letters: B images, C4 latent channels, h and w of the latents,
N = hw/4 tokens of C = 4 C4 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field

from ..bounds import Pixels
from ..call.arguments import real_number
from ..replay import Tensors
from . import Family, Settings

IMAGE_IDS = "img_ids"
"""The input of a denoiser of a range that says where its tokens lie."""


def refuse_odd_sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape. Raises ValueError unless its patches of 2 x 2 are whole."""
    if any(side % 2 for side in shape[1:]):
        raise ValueError(f"expected an even height and width, for patches of 2 x 2, got {list(shape)}")
    return shape


class FluxSettings(Settings):
    """`latents_shape` is that of the latents before they are packed."""

    latents_shape: Annotated[tuple[Pixels, ...], Field(min_length=3, max_length=3), AfterValidator(refuse_odd_sides)]


class Flux(Family):
    """Family `flux`. `true_cfg_scale` and negative prompts are arguments of artifacts that have both branches."""

    settings_type: ClassVar[type[Settings]] = FluxSettings
    latents_name = "packed latents"
    guides_by_step = False  # `guidance_scale` is embedded before the loop

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of `FluxPipeline.__call__` that say what to draw."""
        return (*super().arguments, "true_cfg_scale") if self.branches else super().arguments

    def arranged(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C4, h, w] as [B, N, C]."""
        return pack_latents(latents)

    def loop_shape(self) -> tuple[int, ...]:
        """(N, C)."""
        C, h, w = self.settings.latents_shape
        return math.prod((h // 2, w // 2)), C * 4

    def decodable(self, latents: torch.Tensor) -> torch.Tensor:
        """Packed latents as the decoder takes them, [B, C4, h, w] in an artifact of a range: a number of tokens does not say how many
        of them lie side by side."""
        return unpack_latents(latents, *self.settings.latents_shape[1:]) if self.range else latents

    def conditions(self, given: Mapping[str, Any], guidance_scale: float) -> list[Tensors]:
        """The denoiser's inputs that are equal at every step; in an artifact of a range the tokens' positions are among them."""
        conditions = super().conditions(given, guidance_scale)
        if IMAGE_IDS not in self.inputs:
            return conditions
        positions = token_positions(*self.settings.latents_shape[1:]).to(self._device)
        return [{**condition, IMAGE_IDS: positions} for condition in conditions]

    def branch_guidance(self, given: Mapping[str, Any], guidance_scale: float) -> float:
        """`true_cfg_scale`, which has an effect with a negative prompt only, as in `FluxPipeline`."""
        negative = any(name.startswith("negative_prompt") for name in given)
        scale = real_number("true_cfg_scale", given.get("true_cfg_scale", 1.0))
        return scale if negative else 1.0

    def scalars(self, given: Mapping[str, Any], guidance_scale: float) -> Tensors:
        """The guidance that is embedded."""
        embedded = {"guidance": self.scalar(guidance_scale)} if "guidance" in self.inputs else {}
        return {**super().scalars(given, guidance_scale), **embedded}


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """[B, C4, h, w] to [B, hw/4, 4 C4]: each 2 x 2 patch becomes one token (FluxPipeline._pack_latents)."""
    B, C, h, w = latents.shape
    patches = latents.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)  # [B, h/2, w/2, C4, 2, 2]
    return patches.reshape(B, (h // 2) * (w // 2), C * 4)


def unpack_latents(latents: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """[B, hw/4, 4 C4] to [B, C4, h, w] (FluxPipeline._unpack_latents)."""
    B, _, C = latents.shape
    patches = latents.view(B, h // 2, w // 2, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)  # [B, C4, h/2, 2, w/2, 2]
    return patches.reshape(B, C // 4, h, w)


def token_positions(h: int, w: int) -> torch.Tensor:
    """The tokens of latents of that size as [1, N, 3] of (0, row, column) (FluxPipeline._prepare_latent_image_ids)."""
    rows, columns = torch.arange(h // 2.0), torch.arange(w // 2.0)
    grid = torch.stack(torch.meshgrid(torch.zeros(1), rows, columns, indexing="ij"), dim=-1)
    return grid.reshape(1, len(rows) * len(columns), 3)
