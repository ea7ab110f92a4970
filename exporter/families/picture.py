"""Pictures, as several families have them: their size, the VAE's decoder as a graph, and the eager call that draws one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ...runtime.manifest import Manifest


@dataclass(frozen=True)
class Size:
    """The static shapes of one export. `height` and `width` in pixels, `tokens` of text."""

    height: int
    width: int
    tokens: int


def size_of(manifest: Manifest) -> Size:
    """The size that an artifact was exported for."""
    return Size(manifest.defaults.height, manifest.defaults.width, manifest.pipeline["prompts"][-1]["max_length"])


def check_multiples(size: Size, patch: int, why: str) -> None:
    """Raises ExportError unless both sides are multiples of `patch` pixels; `why` says what makes them so."""
    if size.height % patch or size.width % patch:
        raise ExportError(
            f"shapes.height, shapes.width: expected multiples of {patch} ({why}), got "
            f"{size.height} x {size.width}; the nearest are {round(size.height / patch) * patch} x {round(size.width / patch) * patch}"
        )


class Decoder(nn.Module):
    """float32 latents, as the loop has them -> float32 image [1, 3, H, W] in 0..1.

    The VAE's scaling, `decode` and `VaeImageProcessor.denormalize` in one graph. `arranged` makes [1, C, h, w] of the
    loop's latents where they are something else. `shift` is added where the family's pipeline does so.
    """

    def __init__(
        self,
        vae: Any,
        *,
        channels_last: bool,
        shift: float = 0.0,
        arranged: Callable[[Tensor], Tensor] = lambda latents: latents,
    ) -> None:
        super().__init__()
        self.vae = vae
        self.dtype: torch.dtype = vae.dtype
        self.shift, self.arranged = shift, arranged
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        x = self.arranged(latents) / self.vae.config.scaling_factor
        if self.shift:
            x = x + self.shift
        x = x.to(self.dtype).contiguous(memory_format=self.memory_format)
        image = self.vae.decode(x, return_dict=False)[0]
        return ((image.float() * 0.5 + 0.5).clamp(0, 1).contiguous(),)


def drawn(pipe: Any, prompt: str, seed: int, **call: Any) -> tuple[Tensor, Tensor]:
    """Final latents and image [1, 3, H, W] in 0..1 of one plain diffusers call, with noise of a generator of that seed."""
    last: dict[str, Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(tensors)
        return {}

    generator = torch.Generator().manual_seed(seed)
    image = pipe(prompt, generator=generator, output_type="pt", callback_on_step_end=keep, **call).images
    return last["latents"], image
