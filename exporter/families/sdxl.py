"""Stable Diffusion XL, base and refiner: which graphs a pipeline becomes, and what the runtime needs to know.

In: a loaded `StableDiffusionXLPipeline` (text to image) or `StableDiffusionXLImg2ImgPipeline` (the refiner, which draws
from a picture and may lack the first text encoder), and a resolved recipe. Out: wrappers with flat, named inputs, example
tensors, the facts that `runtime/families/sdxl.py` reads back from the manifest, and the arguments that the pipeline gives
its scheduler. Both branches of classifier-free guidance are in the denoiser's graph; latents travel as [1, C, h, w] in
float32. The watermark and image prompts are left out, and of the text encoders the last layer but one is read (no `clip_skip`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ...runtime.families.sdxl import size_numbers
from ..recipe.schema import GUIDANCE, Guidance
from ..sites.component import Component
from ..sites.guidance import add_guidance
from . import sd
from .picture import (
    Decoder,
    Encoder,
    Size,
    accept_steps,
    call_pipeline,
    check_multiples,
    example_picture,
    no_scheduler_arguments,
    vae_components,
)
from .sd import guidance_inputs, latents_shape
from .text import prompt_entry, refuse_attention_masks, text_component

PICTURE = {"strength": 0.3, "inpaint_strength": 0.9999, "rounded": "up"}
"""What `runtime/families`' `PictureInput` says besides its size: the defaults of diffusers' image-to-image pipelines."""
EMBEDS = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "text_embeds"}
scheduler_arguments, check_steps, noise = no_scheduler_arguments, accept_steps, sd.noise
DOUBLED_INPUTS = (*EMBEDS.values(), "time_ids")


class Denoiser(nn.Module):
    """`UNet2DConditionModel` of one branch: float32 latents in, float32 noise (or v, as the scheduler takes it) out.

    Sinusoids are of float32 timesteps and sizes in any dtype: diffusers casts behind them. Its pipelines round the sizes to
    the text encoder's dtype before, and 1025 pixels are then 1024 in bfloat16.
    """

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = dtype

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        return self.unet(
            hidden_states.to(self.dtype),
            timestep,
            encoder_hidden_states=encoder_hidden_states.to(self.dtype),
            added_cond_kwargs={"text_embeds": text_embeds.to(self.dtype), "time_ids": time_ids},
            return_dict=False,
        )[0].float()


class TextEncoders(nn.Module):
    """Ids [1, L] of each encoder there is -> encoder_hidden_states [1, L, D], text_embeds [1, P].

    The states of the last layer but one lie side by side; what is pooled is the last encoder's, projected.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(e for e in (pipe.text_encoder, pipe.text_encoder_2) if e is not None)

    def forward(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        encoded = [encode(i, output_hidden_states=True) for encode, i in zip(self.encoders, ids, strict=True)]
        states = torch.cat([e.hidden_states[-2] for e in encoded], dim=-1)
        return states.to(encoded[-1].text_embeds.dtype).contiguous(), encoded[-1].text_embeds.contiguous()


class WhitenedEncoder(nn.Module):
    """`Encoder` of a VAE whose configuration gives mean and deviation of its latents: [1, C, h, w] as the loop has them."""

    def __init__(self, encoder: Encoder, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("shift", mean * encoder.vae.config.scaling_factor)
        self.register_buffer("scale", std)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        mean, std = self.encoder(image)
        return (mean - shift) / scale, std / scale


def is_from_picture(pipe: Any) -> bool:
    """Whether the pipeline draws nothing without a picture."""
    return type(pipe).__name__ == "StableDiffusionXLImg2ImgPipeline"


def has_aesthetic_score(pipe: Any) -> bool:
    """Whether the UNet is told an aesthetic score in place of the target size."""
    return bool(pipe.config.get("requires_aesthetics_score", False))


def defaults(pipe: Any) -> dict[str, Any]:
    """What `StableDiffusionXLPipeline.__call__` takes where its caller is silent."""
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return {
        "height": height * pipe.vae_scale_factor,
        "width": width * pipe.vae_scale_factor,
        "max_sequence_length": pipe.tokenizer_2.model_max_length,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
    }


def check_size(pipe: Any, size: Size) -> None:
    """Raises ExportError for a size that the pipeline would not draw, and for a model that is called in another way."""
    name = type(pipe).__name__
    check_multiples(size, math.lcm(8, pipe.vae_scale_factor), f"as {name} asks for")
    lengths = {t.model_max_length for t in (pipe.tokenizer, pipe.tokenizer_2) if t is not None}
    if lengths != {size.tokens}:
        raise ExportError(
            f"shapes.max_sequence_length: expected {' and '.join(map(str, sorted(lengths)))}, to which {name} pads, got {size.tokens}"
        )
    check_unet(pipe)
    refuse_attention_masks(pipe, "text_encoder", "text_encoder_2")
    if pipe.vae.config.force_upcast and pipe.vae.dtype == torch.float16:
        raise ExportError(
            'precision.vae: expected "float32" or "bfloat16", got "float16", in which this VAE overflows (its config says '
            "force_upcast)"
        )


def check_unet(pipe: Any) -> None:
    """Raises ExportError for a UNet that takes other inputs than SDXL's."""
    config = pipe.unet.config
    if config.time_cond_proj_dim is not None:
        raise ExportError(
            f"unet.config.time_cond_proj_dim: expected none, got {config.time_cond_proj_dim}: this UNet takes its guidance as "
            "an embedding, and only guidance between two branches can be exported; take the model that it was distilled from"
        )
    if config.addition_embed_type != "text_time":
        raise ExportError(
            f"unet.config.addition_embed_type: expected 'text_time', as SDXL has it, got {config.addition_embed_type!r}; "
            "take a model of Stable Diffusion XL"
        )
    if config.in_channels != pipe.vae.config.latent_channels:
        raise ExportError(
            f"unet.config.in_channels: expected the VAE's {pipe.vae.config.latent_channels}, got {config.in_channels}: this UNet "
            "takes a mask or a picture beside the latents; take one without, which paints into pictures too"
        )
    numbers = size_numbers({}, (1, 1), has_aesthetic_score(pipe))[1]
    wanted = pipe.unet.add_embedding.linear_1.in_features
    made = config.addition_time_embed_dim * len(numbers) + pipe.text_encoder_2.config.projection_dim
    if wanted != made:
        raise ExportError(
            f"unet.config.projection_class_embeddings_input_dim: expected {made}, for {len(numbers)} numbers of size, got {wanted}; "
            "set requires_aesthetics_score in model_index.json to what the model was trained with"
        )


def denoiser(pipe: Any, size: Size, guidance: Guidance = GUIDANCE) -> Component:
    """The UNet's two branches behind named flat inputs, with example tensors of the export's shapes."""
    config, seeded = pipe.unet.config, torch.Generator().manual_seed(0)
    dtype, pooled = pipe.text_encoder_2.dtype, pipe.text_encoder_2.config.projection_dim
    named = {
        "hidden_states": torch.randn(1, *latents_shape(pipe, size), generator=seeded),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, size.tokens, config.cross_attention_dim, generator=seeded).to(dtype),
        "text_embeds": torch.randn(1, pooled, generator=seeded).to(dtype),
        "time_ids": time_ids(pipe, size)[1:],
    }
    module = Denoiser(pipe.unet, pipe.unet.dtype).eval()
    branch = Component("denoiser", module, tuple(named), ("sample",), tuple(named.values()), {"": "unet."})
    return add_guidance(branch, DOUBLED_INPUTS, batched=guidance.batched, rescale=True)


def time_ids(pipe: Any, size: Size) -> Tensor:
    """The sizes of both branches where a caller says nothing of them, float32 [2, 6], or [2, 5] with a score."""
    return torch.tensor(size_numbers({}, (size.height, size.width), has_aesthetic_score(pipe)), dtype=torch.float32)


def prompt_entries(pipe: Any, size: Size) -> list[dict[str, Any]]:
    """The two CLIPs', or where the first is left out the second's alone, which then reads `prompt` as in diffusers."""
    second = prompt_entry("tokenizer_2", pipe.tokenizer_2, size.tokens, inversions=True)
    if pipe.text_encoder is None:
        return [{**second, "argument": "prompt"}]
    return [prompt_entry("tokenizer", pipe.tokenizer, size.tokens, inversions=True), second]


def other_components(pipe: Any, size: Size, *, channels_last: bool, picture: bool = False) -> tuple[Component, ...]:
    """The text encoders in one graph, with `picture` the VAE's encoder, and its decoder last.

    Raises ExportError for a refiner without `picture`: it would have nothing to begin from.
    """
    if is_from_picture(pipe) and not picture:
        raise ExportError(
            f"sampler.image_to_image: expected true, got false: {type(pipe).__name__} begins from a picture, and its plans in the middle"
        )
    latents = torch.zeros(1, *latents_shape(pipe, size))
    decoder, encoder = vae_halves(pipe.vae, channels_last)
    return (
        text_component(TextEncoders(pipe), prompt_entries(pipe, size), EMBEDS),
        *vae_components(pipe.vae, size, latents, decoder, encoder if picture else None, channels_last=channels_last),
    )


range_unit, range_denoiser, range_components = sd.range_unit, denoiser, other_components


def vae_halves(vae: Any, channels_last: bool) -> tuple[nn.Module, nn.Module]:
    """Decoder and encoder. A VAE whose configuration has `latents_mean` and `latents_std` (Playground 2.5) is scaled with
    these too, by the pipelines for pictures; their painting into pictures leaves them out, and not so here."""
    encoder = Encoder(vae, channels_last=channels_last)
    numbers = [vae.config.get("latents_mean"), vae.config.get("latents_std")]
    if None in numbers:
        return Decoder(vae, channels_last=channels_last).eval(), encoder.eval()
    mean, std = (torch.tensor(n, dtype=torch.float32).view(1, -1, 1, 1) for n in numbers)
    shift = mean * vae.config.scaling_factor
    decoder = Decoder(vae, channels_last=channels_last, arranged=lambda latents: latents * std + shift)
    return decoder.eval(), WhitenedEncoder(encoder, mean, std).eval()


def facts(pipe: Any, size: Size) -> dict[str, Any]:
    """The manifest's `pipeline` table, which `runtime/families/sdxl.py` validates and drives."""
    needed = {"picture": {"height": size.height, "width": size.width, **PICTURE, "required": True}}
    return {
        "latents_shape": list(latents_shape(pipe, size)),
        "timestep_scale": 1.0,
        "text": {
            "prompts": prompt_entries(pipe, size),
            "embeds": EMBEDS,
            "zero_negative": bool(pipe.config.force_zeros_for_empty_prompt),
        },
        "scored": has_aesthetic_score(pipe),
        "num_train_timesteps": pipe.scheduler.config.num_train_timesteps,
        **(needed if is_from_picture(pipe) else {}),
    }


def encode(
    pipe: Any, size: Size, prompt: str, guidance_scale: float, guidance: Guidance = GUIDANCE
) -> dict[str, Tensor]:
    """The denoiser's inputs that are equal at every step, from the pipeline's own encoders: both branches' [1, 2, ...]. At a
    guidance of 1 or less both are the prompt's, as in `runtime/families`."""
    states, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt, device="cpu", do_classifier_free_guidance=guidance_scale > 1
    )
    both = [torch.stack((a if b is None else b, a), dim=1) for a, b in ((states, negative), (pooled, negative_pooled))]
    ids = time_ids(pipe, size)[None]
    return {
        **dict(zip(EMBEDS.values(), both, strict=True)),
        "time_ids": ids if guidance_scale > 1 else ids[:, [1, 1]],
        **guidance_inputs(guidance_scale),
    }


def draw(pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size) -> tuple[Tensor, Tensor]:
    """Final latents [1, 4, h, w] and image [1, 3, H, W] in 0..1 of the plain diffusers call: what an artifact is held
    against. Without the watermark. The refiner gets the seed's example picture, and takes all steps from there."""
    start: dict[str, Any] = {"height": size.height, "width": size.width}
    if is_from_picture(pipe):
        start = {"image": example_picture(size, seed), "strength": 1.0}
    with disable_watermark(pipe):
        return call_pipeline(pipe, prompt, seed, num_inference_steps=steps, guidance_scale=guidance_scale, **start)


@contextlib.contextmanager
def disable_watermark(pipe: Any) -> Iterator[None]:
    """The pipeline without its watermark, which it has where invisible-watermark is installed."""
    watermark, pipe.watermark = pipe.watermark, None
    try:
        yield
    finally:
        pipe.watermark = watermark
