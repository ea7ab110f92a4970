"""Stable Diffusion 3 and 3.5 (text to image): which graphs a pipeline becomes, and what the runtime needs to know.

In: a loaded `StableDiffusion3Pipeline` and a resolved recipe. Out: wrappers with flat, named inputs, example tensors, the
facts that `runtime/families/sd3.py` reads back from the manifest, and the arguments that the pipeline gives its scheduler.
Both branches of classifier-free guidance are in the denoiser's graph; latents travel as [1, C, h, w] in float32. Image
prompts (IP-Adapter) and the guidance that skips layers are left out, and of CLIP the last layer but one is read (no
`clip_skip`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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
    refuse_foreign_scheduler,
    vae_components,
)
from .text import prompt_entry, refuse_attention_masks, text_component

PICTURE = {"strength": 0.6, "inpaint_strength": 0.6, "rounded": "down"}
"""What `runtime/families`' `PictureInput` says besides its size: the defaults of diffusers' pipelines for image-to-image and
inpainting."""
PATCH = 2  # latents to a token, each way
EMBEDS = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}


class Denoiser(nn.Module):
    """`SD3Transformer2DModel` of one branch: float32 latents in, float32 velocity out.

    Its sinusoids are of float32 timesteps, 0 to 1000, in any dtype: diffusers casts behind them.
    """

    def __init__(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        return self.transformer(
            hidden_states=hidden_states.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states.to(self.dtype),
            pooled_projections=pooled_projections.to(self.dtype),
            return_dict=False,
        )[0].float()


class TextEncoders(nn.Module):
    """Two CLIPs' ids [1, L] and T5's [1, T] -> encoder_hidden_states [1, L + T, D], pooled_projections [1, P].

    The CLIPs' states of the last layer but one lie side by side, padded with zeros to T5's width, and T5's follow them;
    the pooled ones lie side by side. Without T5 (`text_encoder_3 = None`) its states are zeros, as in the pipeline.
    """

    def __init__(self, pipe: Any, tokens: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
        self.text_encoder_3 = pipe.text_encoder_3
        self.shape = (tokens, pipe.transformer.config.joint_attention_dim)

    def forward(self, input_ids: Tensor, input_ids_2: Tensor, input_ids_3: Tensor | None = None) -> tuple[Tensor, ...]:
        clips = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in ((self.text_encoder, input_ids), (self.text_encoder_2, input_ids_2))
        ]
        states = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        t5 = self.text_encoder_3
        long = states.new_zeros(1, *self.shape) if t5 is None else t5(input_ids_3)[0]
        states = pad(states, (0, long.shape[-1] - states.shape[-1]))
        return torch.cat((states, long), dim=-2), torch.cat([clip.text_embeds for clip in clips], dim=-1)


def defaults(pipe: Any) -> dict[str, Any]:
    """What `StableDiffusion3Pipeline.__call__` takes where its caller is silent."""
    side = pipe.default_sample_size * pipe.vae_scale_factor
    return {
        "height": side,
        "width": side,
        "max_sequence_length": 256,
        "num_inference_steps": 28,
        "guidance_scale": 7.0,
    }


def check_size(pipe: Any, size: Size) -> None:
    """Raises ExportError for a size that the pipeline would not draw, and for a pipeline whose encoders or transformer are
    called in another way."""
    patch = pipe.patch_size
    if patch != PATCH:
        raise ExportError(
            f"transformer.config.patch_size: expected {PATCH}, which every published SD3 has, got {patch}"
        )
    factor = pipe.vae_scale_factor * patch
    check_multiples(size, factor, f"VAE factor {pipe.vae_scale_factor}, patches of {patch}")
    largest = pipe.transformer.config.pos_embed_max_size * factor
    if max(size.height, size.width) > largest:
        raise ExportError(
            f"shapes.height, shapes.width: expected at most {largest}, for which the model has positions, got "
            f"{size.height} x {size.width}"
        )
    if not 1 <= size.tokens <= 512:
        raise ExportError(
            f"shapes.max_sequence_length: expected 1 to 512 tokens as StableDiffusion3Pipeline does, got {size.tokens}"
        )
    refuse_attention_masks(pipe, "text_encoder", "text_encoder_2")
    channels, latents = pipe.transformer.config.in_channels, pipe.vae.config.latent_channels
    if channels != latents:
        raise ExportError(
            f"transformer.config.in_channels: expected the VAE's {latents}, got {channels}: a model for inpainting, which "
            "takes a mask beside the latents; export the one for text to image"
        )


def latents_shape(pipe: Any, size: Size) -> tuple[int, int, int]:
    """Shape of one image's latents: [C, h, w]."""
    factor = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, size.height // factor, size.width // factor


def denoiser(pipe: Any, size: Size, guidance: Guidance = GUIDANCE) -> Component:
    """The transformer's two branches behind named flat inputs, with example tensors of the export's shapes."""
    config, encoder_dtype = pipe.transformer.config, pipe.text_encoder.dtype
    length = pipe.tokenizer_max_length + size.tokens
    seeded = torch.Generator().manual_seed(0)
    named = {
        "hidden_states": torch.randn(1, *latents_shape(pipe, size), generator=seeded),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, length, config.joint_attention_dim, generator=seeded).to(encoder_dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=seeded).to(encoder_dtype),
    }
    module = Denoiser(pipe.transformer, pipe.transformer.dtype).eval()
    branch = Component("denoiser", module, tuple(named), ("sample",), tuple(named.values()), {"": "transformer."})
    return add_guidance(branch, tuple(EMBEDS.values()), batched=guidance.batched)


def prompt_entries(pipe: Any, size: Size) -> list[dict[str, Any]]:
    """The manifest's prompt entries for the two CLIPs, and for T5 where the pipeline has it."""
    length = pipe.tokenizer_max_length
    clips = [prompt_entry("tokenizer", pipe.tokenizer, length), prompt_entry("tokenizer_2", pipe.tokenizer_2, length)]
    if pipe.text_encoder_3 is None:
        return clips
    return [*clips, prompt_entry("tokenizer_3", pipe.tokenizer_3, size.tokens)]


def other_components(pipe: Any, size: Size, *, channels_last: bool, picture: bool = False) -> tuple[Component, ...]:
    """The text encoders in one graph, with `picture` the VAE's encoder, and its decoder last."""
    shift = pipe.vae.config.shift_factor
    decoder = Decoder(pipe.vae, channels_last=channels_last, shift=shift)
    encoder = Encoder(pipe.vae, channels_last=channels_last, shift=shift) if picture else None
    latents = torch.zeros(1, *latents_shape(pipe, size))
    return (
        text_component(TextEncoders(pipe, size.tokens), prompt_entries(pipe, size), EMBEDS),
        *vae_components(pipe.vae, size, latents, decoder, encoder, channels_last=channels_last),
    )


def range_unit(pipe: Any) -> int:
    """Pixels that both sides are multiples of at every size of a range."""
    return pipe.vae_scale_factor * PATCH


range_denoiser, range_components = denoiser, other_components
check_steps = accept_steps


def scheduler_arguments(scheduler: Any, latents_shape: Sequence[int], steps: int) -> dict[str, Any]:
    """What `StableDiffusion3Pipeline.__call__` passes to `set_timesteps` besides the number of steps: where the shift
    grows with the picture, by how much.

    Raises ExportError for a scheduler that scales its noise, which the pipeline leaves as it is.
    """
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    config = scheduler.config
    if getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
        raise ExportError(
            "sampler.scheduler: expected one that starts from noise of deviation 1, as StableDiffusion3Pipeline does, got "
            f"{type(scheduler).__name__}; take FlowMatchEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler"
        )
    refuse_foreign_scheduler(scheduler, "order", arguments={"mu": None} if config.get("use_dynamic_shifting") else {})
    if not config.get("use_dynamic_shifting"):
        return {}
    _, h, w = latents_shape
    mu = calculate_shift(
        (h // PATCH) * (w // PATCH),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.16),
    )
    return {"mu": mu}


def facts(pipe: Any, size: Size) -> dict[str, Any]:
    """The manifest's `pipeline` table, which `runtime/families/sd3.py` validates and drives."""
    return {
        "latents_shape": list(latents_shape(pipe, size)),
        "timestep_scale": 1.0,
        "max_sequence_length": size.tokens,
        "text": {"prompts": prompt_entries(pipe, size), "embeds": EMBEDS},
    }


def encode(
    pipe: Any, size: Size, prompt: str, guidance_scale: float, guidance: Guidance = GUIDANCE
) -> dict[str, Tensor]:
    """The denoiser's inputs that are equal at every step, from the pipeline's own encoders: both branches' [1, 2, ...]. At a
    guidance of 1 or less both are the prompt's, as in `runtime/families`."""
    states, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt,
        prompt,
        prompt,
        do_classifier_free_guidance=guidance_scale > 1,
        max_sequence_length=size.tokens,
    )
    pairs = ((negative, states), (negative_pooled, pooled))
    both = [torch.stack((own if other is None else other, own), dim=1) for other, own in pairs]
    return {
        **dict(zip(EMBEDS.values(), both, strict=True)),
        "guidance_scale": torch.tensor([max(guidance_scale, 1.0)]),
    }


def noise(pipe: Any, size: Size, generator: torch.Generator) -> Tensor:
    """Standard normal latents [1, C, h, w], the numbers that the pipeline draws."""
    return torch.randn(1, *latents_shape(pipe, size), generator=generator)


def draw(pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size) -> tuple[Tensor, Tensor]:
    """Final latents [1, C, h, w] and image [1, 3, H, W] in 0..1 of the plain diffusers call: what an artifact is held
    against."""
    return call_pipeline(
        pipe,
        prompt,
        seed,
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=size.tokens,
    )
