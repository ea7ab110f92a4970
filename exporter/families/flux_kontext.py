"""FLUX.1 Kontext: FLUX, whose transformer sees a picture's tokens after those of the latents.

In and out: as for `flux.py`, of a loaded `FluxKontextPipeline`. The picture passes the VAE's encoder once per call and
enters the denoiser as `image_latents`, packed; it is as large as what is drawn. For a picture of the same proportions
that is what `FluxKontextPipeline` itself makes of it at the sizes that Kontext was trained on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.families.flux import pack_latents
from ...runtime.pictures import preprocess_pictures
from ..recipe.schema import GUIDANCE, Guidance
from ..sites.component import Component
from . import flux
from .picture import Encoder, Size, call_pipeline, example_picture, refuse_range

PICTURE = {"role": "reference", "sampled": False, "required": True}
"""What `runtime/families`' `PictureInput` says besides its size: looked at at every step, and encoded to the mean."""

defaults, check_size, check_steps, facts = flux.defaults, flux.check_size, flux.check_steps, flux.facts
prompt_entries, scheduler_arguments, noise = flux.prompt_entries, flux.scheduler_arguments, flux.noise
other_components = partial(flux.other_components, picture=True)
"""FLUX's graphs and always the VAE's encoder: nothing is drawn without a picture."""


class Denoiser(nn.Module):
    """FLUX's with `image_latents` [1, M, C] as its second input; `flux` has the positions of N latents and M of the picture."""

    def __init__(self, flux: nn.Module) -> None:
        super().__init__()
        self.flux = flux

    def forward(self, hidden_states: Tensor, image_latents: Tensor, *others: Tensor) -> Tensor:
        sample = self.flux(torch.cat((hidden_states, image_latents), dim=1), *others)  # [1, N + M, C]
        return sample[:, : hidden_states.shape[1]]


def denoiser(pipe: Any, size: Size, guidance: Guidance = GUIDANCE) -> Component:
    """The transformer behind named flat inputs. Both branches of true guidance see the same picture."""
    own = flux.token_positions(pipe, size)
    pictures = own.clone()
    pictures[:, 0] = 1
    ids = torch.cat((own, pictures)), torch.zeros(size.tokens, 3)
    latents, *rest = flux.example_inputs(pipe, size).items()
    image = ("image_latents", torch.randn(latents[1].shape, generator=torch.Generator().manual_seed(1)))
    module = Denoiser(flux.Denoiser(pipe.transformer, pipe.transformer.dtype, *ids))
    return flux.denoiser_component(module, dict((latents, image, *rest)), guidance, "flux.transformer.")


def range_unit(pipe: Any) -> int:
    """Raises ExportError: its positions are constants of one size."""
    refuse_range("FLUX Kontext has the positions of the image and of the picture beside it as constants of one size")


range_denoiser, range_components = denoiser, other_components


def encode(
    pipe: Any, size: Size, prompt: str, guidance_scale: float, guidance: Guidance = GUIDANCE
) -> dict[str, Tensor]:
    """The denoiser's inputs that are equal at every step, of the prompt and an example picture."""
    encoder = Encoder(pipe.vae, channels_last=False, shift=pipe.vae.config.shift_factor)
    image, _ = encoder(preprocess_pictures(example_picture(size, 0), size.height, size.width))
    return {**flux.encode(pipe, size, prompt, guidance_scale, guidance), "image_latents": pack_latents(image)}


def draw(pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size) -> tuple[Tensor, Tensor]:
    """Final latents [1, N, C] and image [1, 3, H, W] in 0..1 of the diffusers call at the export's size, for the seed's
    example picture."""
    return call_pipeline(
        pipe,
        prompt,
        seed,
        image=example_picture(size, seed),
        height=size.height,
        width=size.width,
        max_area=size.height * size.width,
        _auto_resize=False,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=size.tokens,
    )
