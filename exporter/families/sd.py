"""Stable Diffusion 1 and 2 (text to image): which graphs a pipeline becomes, and what the runtime needs to know.

In: a loaded `StableDiffusionPipeline` and a resolved recipe. Out: wrappers with flat, named inputs, example tensors, the
facts that `runtime/families` reads back from the manifest, and the arguments that the pipeline gives its
scheduler. Both branches of classifier-free guidance are in the denoiser's graph; latents travel as [1, 4, h, w] in
float32. The safety checker and image prompts are left out, and the text encoder's last layer is the one that is read
(no `clip_skip`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ..recipe.schema import GUIDANCE, Guidance
from ..sites.component import Component
from ..sites.guidance import add_guidance
from .picture import (
    Decoder,
    Encoder,
    Size,
    accept_steps,
    call_pipeline,
    check_multiples,
    find_latent_multiple,
    no_scheduler_arguments,
    vae_components,
)
from .text import TextStates, prompt_entry, refuse_attention_masks, text_component

PICTURE = {"strength": 0.8, "inpaint_strength": 1.0, "rounded": "up"}
"""What `runtime/families`' `PictureInput` says besides its size: the defaults of diffusers' image-to-image pipelines."""
EMBEDS = {"prompt_embeds": "encoder_hidden_states"}


class Denoiser(nn.Module):
    """`UNet2DConditionModel` of one branch: float32 latents in, float32 noise (or v, as the scheduler takes it) out.

    Its sinusoids are of float32 timesteps in any dtype: diffusers casts behind them.
    """

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = dtype

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        states = encoder_hidden_states.to(self.dtype)
        return self.unet(hidden_states.to(self.dtype), timestep, states, return_dict=False)[0].float()


def defaults(pipe: Any) -> dict[str, Any]:
    """What `StableDiffusionPipeline.__call__` takes where its caller is silent."""
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return {
        "height": height * pipe.vae_scale_factor,
        "width": width * pipe.vae_scale_factor,
        "max_sequence_length": pipe.tokenizer.model_max_length,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
    }


def check_size(pipe: Any, size: Size) -> None:
    """Raises ExportError for a size that the pipeline would not draw, and for a pipeline that is guided in another way."""
    check_multiples(size, math.lcm(8, pipe.vae_scale_factor), "as StableDiffusionPipeline asks for")
    length = pipe.tokenizer.model_max_length
    if size.tokens != length:
        raise ExportError(
            f"shapes.max_sequence_length: expected {length}, to which StableDiffusionPipeline pads, got {size.tokens}"
        )
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ExportError(
            "unet.config.time_cond_proj_dim: expected none, got "
            f"{pipe.unet.config.time_cond_proj_dim}: this UNet takes its guidance as an embedding, and only guidance "
            "between two branches can be exported; take the model that it was distilled from"
        )
    channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latents:
        raise ExportError(
            f"unet.config.in_channels: expected {latents} as the VAE's latents have, got {channels}: UNets that see a picture "
            "beside the latents cannot be exported; inpainting works with the model for text to image"
        )
    refuse_attention_masks(pipe, "text_encoder")


def latents_shape(pipe: Any, size: Size) -> tuple[int, int, int]:
    """Shape of one image's latents: [C, h, w]."""
    return (
        pipe.unet.config.in_channels,
        size.height // pipe.vae_scale_factor,
        size.width // pipe.vae_scale_factor,
    )


def denoiser(pipe: Any, size: Size, guidance: Guidance = GUIDANCE) -> Component:
    """The UNet's two branches behind named flat inputs, with example tensors of the export's shapes."""
    seeded = torch.Generator().manual_seed(0)
    states = torch.randn(1, size.tokens, pipe.unet.config.cross_attention_dim, generator=seeded)
    named = {
        "hidden_states": torch.randn(1, *latents_shape(pipe, size), generator=seeded),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": states.to(pipe.text_encoder.dtype),
    }
    module = Denoiser(pipe.unet, pipe.unet.dtype).eval()
    branch = Component("denoiser", module, tuple(named), ("sample",), tuple(named.values()), {"": "unet."})
    return add_guidance(branch, tuple(EMBEDS.values()), batched=guidance.batched, rescale=True)


def prompt_entries(pipe: Any, size: Size) -> list[dict[str, Any]]:
    """The manifest's prompt entry for CLIP."""
    return [prompt_entry("tokenizer", pipe.tokenizer, size.tokens, inversions=True)]


def other_components(pipe: Any, size: Size, *, channels_last: bool, picture: bool = False) -> tuple[Component, ...]:
    """The text encoder, with `picture` the VAE's encoder, and its decoder last. `StableDiffusionPipeline` scales latents
    and never shifts them."""
    decoder = Decoder(pipe.vae, channels_last=channels_last)
    encoder = Encoder(pipe.vae, channels_last=channels_last) if picture else None
    latents = torch.zeros(1, *latents_shape(pipe, size))
    return (
        text_component(TextStates(pipe.text_encoder), prompt_entries(pipe, size), EMBEDS),
        *vae_components(pipe.vae, size, latents, decoder, encoder, channels_last=channels_last),
    )


def range_unit(pipe: Any) -> int:
    """Pixels that both sides are multiples of at every size of a range."""
    return math.lcm(8, pipe.vae_scale_factor * find_latent_multiple(pipe.unet))


range_denoiser, range_components = denoiser, other_components
scheduler_arguments, check_steps = no_scheduler_arguments, accept_steps


def facts(pipe: Any, size: Size) -> dict[str, Any]:
    """The manifest's `pipeline` table, which `runtime/families` validates and drives."""
    return {
        "latents_shape": list(latents_shape(pipe, size)),
        "timestep_scale": 1.0,
        "text": {"prompts": prompt_entries(pipe, size), "embeds": EMBEDS},
    }


def encode(
    pipe: Any, size: Size, prompt: str, guidance_scale: float, guidance: Guidance = GUIDANCE
) -> dict[str, Tensor]:
    """The denoiser's inputs that are equal at every step, from the pipeline's own encoder: both branches' states
    [1, 2, L, D]. At a guidance of 1 or less both are the prompt's, as in `runtime/families`."""
    states, negative = pipe.encode_prompt(prompt, "cpu", 1, guidance_scale > 1)
    other = states if negative is None else negative
    return {"encoder_hidden_states": torch.stack((other, states), dim=1), **guidance_inputs(guidance_scale)}


def guidance_inputs(guidance_scale: float) -> dict[str, Tensor]:
    """Guidance as the graph takes it, not rescaled."""
    return {"guidance_scale": torch.tensor([max(guidance_scale, 1.0)]), "guidance_rescale": torch.tensor([0.0])}


def noise(pipe: Any, size: Size, generator: torch.Generator) -> Tensor:
    """Standard normal latents [1, C, h, w], the numbers that the pipeline draws."""
    return torch.randn(1, *latents_shape(pipe, size), generator=generator)


def draw(pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size) -> tuple[Tensor, Tensor]:
    """Final latents [1, 4, h, w] and image [1, 3, H, W] in 0..1 of the plain diffusers call: what an artifact is held
    against. Without the safety checker, which would paint some of them black."""
    with disable_safety_checker(pipe):
        return call_pipeline(
            pipe,
            prompt,
            seed,
            height=size.height,
            width=size.width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )


@contextlib.contextmanager
def disable_safety_checker(pipe: Any) -> Iterator[None]:
    """The pipeline without its safety checker."""
    checker, pipe.safety_checker = pipe.safety_checker, None
    try:
        yield
    finally:
        pipe.safety_checker = checker
