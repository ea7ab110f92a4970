"""PixArt-Sigma and PixArt-Alpha (text to image): which graphs a pipeline becomes, and what the runtime needs to know.

In: a loaded `PixArtSigmaPipeline` or `PixArtAlphaPipeline` and a resolved recipe. Out: wrappers with flat, named inputs,
example tensors, the facts that `runtime/families` reads back from the manifest, and the arguments that the pipeline gives
its scheduler. Both branches of classifier-free guidance are in the denoiser's graph; latents travel as [1, C, h, w] in
float32. A picture has the size that was exported, as with `use_resolution_binning=False`, and a caption is put in lower
case and stripped, as with `clean_caption=False`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ..recipe.schema import GUIDANCE, Guidance
from ..sites.component import Component
from ..sites.guidance import add_guidance
from .picture import Decoder, Size, check_multiples, no_scheduler_arguments, refuse_range, vae_components
from .text import prompt_entry, text_component

PICTURE = None
"""No pipeline of this family begins from a picture."""
EMBEDS = {"prompt_embeds": "encoder_hidden_states", "prompt_attention_mask": "encoder_attention_mask"}


class Denoiser(nn.Module):
    """`PixArtTransformer2DModel` of one branch: float32 latents in, float32 noise out, without the variance that it may
    predict beside it.

    Its sinusoids are of float32 timesteps in any dtype: diffusers casts behind them. `micro` are the resolution [1, 2] and
    the aspect ratio [1, 1] that Alpha's large models are told, in float32 too, where diffusers rounds them to the dtype of
    the prompt's embeddings.
    """

    def __init__(self, transformer: nn.Module, dtype: torch.dtype, channels: int, micro: dict[str, Tensor]) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype, self.channels = dtype, channels
        self.micro = tuple(micro)
        for name, value in micro.items():
            self.register_buffer(name, value)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        B = hidden_states.shape[0]
        sample = self.transformer(
            hidden_states.to(self.dtype),
            timestep=timestep.expand(B),
            encoder_hidden_states=encoder_hidden_states.to(self.dtype),
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs={
                "resolution": None,
                "aspect_ratio": None,
                **{name: self.get_buffer(name).expand(B, -1) for name in self.micro},
            },
            return_dict=False,
        )[0]
        return sample[:, : self.channels].float().contiguous()


class MaskedTextEncoder(nn.Module):
    """T5's ids and their mask, int64 [1, T] -> encoder_hidden_states [1, T, D], and the mask as float32 [1, T]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.text_encoder(input_ids, attention_mask=attention_mask)[0]
        return states.contiguous(), attention_mask.float()


def is_alpha(pipe: Any) -> bool:
    return type(pipe).__name__ == "PixArtAlphaPipeline"


def defaults(pipe: Any) -> dict[str, Any]:
    """What the pipeline's `__call__` takes where its caller is silent."""
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return {
        "height": side,
        "width": side,
        "max_sequence_length": 120 if is_alpha(pipe) else 300,
        "num_inference_steps": 20,
        "guidance_scale": 4.5,
    }


def check_size(pipe: Any, size: Size) -> None:
    """Raises ExportError for a size that the pipeline would not draw."""
    patch = pipe.transformer.config.patch_size
    factor = math.lcm(8, pipe.vae_scale_factor * patch)
    check_multiples(size, factor, f"of 8, VAE factor {pipe.vae_scale_factor}, patches of {patch}")
    if size.tokens < 1:
        raise ExportError(f"shapes.max_sequence_length: expected 1 token or more, got {size.tokens}")


def latents_shape(pipe: Any, size: Size) -> tuple[int, int, int]:
    """Shape of one image's latents: [C, h, w]."""
    factor = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, size.height // factor, size.width // factor


def micro_conditions(pipe: Any, size: Size) -> dict[str, Tensor]:
    """What `PixArtAlphaPipeline` tells its models for 1024 x 1024 pixels of the picture; nothing for all others."""
    if not (is_alpha(pipe) and pipe.transformer.config.sample_size == 128):
        return {}
    return {
        "resolution": torch.tensor([[float(size.height), float(size.width)]]),
        "aspect_ratio": torch.tensor([[size.height / size.width]]),
    }


def denoiser(pipe: Any, size: Size, guidance: Guidance = GUIDANCE) -> Component:
    """The transformer's two branches behind named flat inputs, with example tensors of the export's shapes."""
    config = pipe.transformer.config
    seeded = torch.Generator().manual_seed(0)
    states = torch.randn(1, size.tokens, pipe.text_encoder.config.d_model, generator=seeded)
    mask = (torch.arange(size.tokens) < max(1, size.tokens // 2)).float()
    named = {
        "hidden_states": torch.randn(1, *latents_shape(pipe, size), generator=seeded),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": states.to(pipe.text_encoder.dtype),
        "encoder_attention_mask": mask[None],
    }
    module = Denoiser(pipe.transformer, pipe.transformer.dtype, config.in_channels, micro_conditions(pipe, size)).eval()
    branch = Component("denoiser", module, tuple(named), ("sample",), tuple(named.values()), {"": "transformer."})
    return add_guidance(branch, tuple(EMBEDS.values()), batched=guidance.batched)


def prompt_entries(pipe: Any, size: Size) -> list[dict[str, Any]]:
    """The manifest's prompt entry for T5."""
    return [prompt_entry("tokenizer", pipe.tokenizer, size.tokens, mask=True, lower=True)]


def other_components(pipe: Any, size: Size, *, channels_last: bool, picture: bool = False) -> tuple[Component, ...]:
    """The text encoder and the VAE's decoder. The pipelines scale latents and never shift them; none of them begins from
    a picture."""
    decoder = Decoder(pipe.vae, channels_last=channels_last)
    latents = torch.zeros(1, *latents_shape(pipe, size))
    return (
        text_component(MaskedTextEncoder(pipe.text_encoder), prompt_entries(pipe, size), EMBEDS),
        *vae_components(pipe.vae, size, latents, decoder, None, channels_last=channels_last),
    )


def range_unit(pipe: Any) -> int:
    """Raises ExportError: its positions are made for one size."""
    refuse_range("PixArt's transformer makes its positions for the size that it is traced at")


range_denoiser, range_components = denoiser, other_components
scheduler_arguments = no_scheduler_arguments


def check_steps(pipe: Any, steps: int) -> None:
    """Raises ExportError for one step of Alpha, where diffusers takes the scheduler's prediction of the picture in place of
    its step."""
    if is_alpha(pipe) and steps == 1:
        raise ExportError("sampler.steps: expected 2 or more, got 1, which PixArtAlphaPipeline takes in another way")


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
    [1, 2, T, D] and masks [1, 2, T]. At a guidance of 1 or less both are the prompt's, as in `runtime/families`."""
    states, mask, negative, negative_mask = pipe.encode_prompt(
        prompt, guidance_scale > 1, max_sequence_length=size.tokens, clean_caption=False
    )
    pairs = ((negative, states), (negative_mask, mask.float()))
    both = [torch.stack((own if other is None else other.to(own.dtype), own), dim=1) for other, own in pairs]
    return {
        **dict(zip(EMBEDS.values(), both, strict=True)),
        "guidance_scale": torch.tensor([max(guidance_scale, 1.0)]),
    }


def noise(pipe: Any, size: Size, generator: torch.Generator) -> Tensor:
    """Standard normal latents [1, C, h, w], the numbers that the pipeline draws."""
    return torch.randn(1, *latents_shape(pipe, size), generator=generator)


def draw(pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size) -> tuple[Tensor, Tensor]:
    """Final latents [1, C, h, w] and image [1, 3, H, W] in 0..1 of the plain diffusers call: what an artifact is held
    against. These pipelines know `callback` alone, with the latents as its third argument."""
    last: dict[str, Tensor] = {}
    image = pipe(
        prompt,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=size.tokens,
        clean_caption=False,
        use_resolution_binning=False,
        callback=lambda step, timestep, latents: last.update(latents=latents),
    ).images
    return last["latents"], image
