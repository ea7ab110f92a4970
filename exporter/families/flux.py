"""FLUX (text to image): which graphs a pipeline becomes, and what the runtime needs to know to drive them.

In: a loaded `FluxPipeline` and a resolved recipe. Out: wrappers with flat, named inputs, example tensors, the facts
that `runtime/families/flux.py` reads back from the manifest, and the arguments that `FluxPipeline.__call__` gives its
scheduler. Latents travel packed and in float32, [1, N, C]; every graph casts inside, so the loop only adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ...runtime.manifest import Manifest
from ..component import Component

PIPELINE = "FluxPipeline"
DEFAULTS = {"height": 1024, "width": 1024, "max_sequence_length": 512, "num_inference_steps": 28, "guidance_scale": 3.5}


@dataclass(frozen=True)
class Size:
    """The static shapes of one export. `height` and `width` in pixels, `tokens` of text."""

    height: int
    width: int
    tokens: int


class Denoiser(nn.Module):
    """`FluxTransformer2DModel` with the token positions as constants: float32 packed latents in, float32 velocity out."""

    def __init__(self, transformer: nn.Module, dtype: torch.dtype, image_ids: Tensor, text_ids: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype
        self.register_buffer("image_ids", image_ids)
        self.register_buffer("text_ids", text_ids)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        with exact_times(self.transformer, timestep, guidance):
            sample = self.transformer(
                hidden_states=hidden_states.to(self.dtype),
                encoder_hidden_states=encoder_hidden_states.to(self.dtype),
                pooled_projections=pooled_projections.to(self.dtype),
                timestep=timestep,
                guidance=guidance,
                img_ids=self.image_ids,
                txt_ids=self.text_ids,
                return_dict=False,
            )[0]
        return sample.float()


@contextlib.contextmanager
def exact_times(transformer: nn.Module, timestep: Tensor, guidance: Tensor | None) -> Iterator[None]:
    """Inside, the sinusoids of timestep and guidance are taken of float32 values.

    `FluxTransformer2DModel.forward` rounds both to the model's dtype first. In bfloat16 guidance 3.5 becomes 3504 of 3500
    and timestep 977.3 becomes 976; without that, the first evaluation of `shapes` is off by 0.005 in place of 0.063.
    """
    times = tuple(t * 1000 for t in (timestep, guidance) if t is not None)
    embed = transformer.get_submodule("time_text_embed")
    handle = embed.register_forward_pre_hook(lambda _, args: (*times, args[-1]))
    try:
        yield
    finally:
        handle.remove()


class PooledText(nn.Module):
    """CLIP: input_ids [1, L] -> pooled_projections [1, P]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.encoder(input_ids, output_hidden_states=False).pooler_output.contiguous(),)


class TextStates(nn.Module):
    """T5: input_ids [1, T] -> encoder_hidden_states [1, T, D]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.encoder(input_ids, output_hidden_states=False)[0].contiguous(),)


class Decoder(nn.Module):
    """Packed float32 latents [1, N, C] -> float32 image [1, 3, H, W] in 0..1.

    `FluxPipeline._unpack_latents`, the VAE's scaling, `decode` and `VaeImageProcessor.denormalize` in one graph.
    """

    def __init__(self, vae: nn.Module, dtype: torch.dtype, rows: int, columns: int, channels_last: bool) -> None:
        super().__init__()
        self.vae: Any = vae
        self.dtype, self.rows, self.columns = dtype, rows, columns
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        batch, _, channels = latents.shape
        x = latents.view(batch, self.rows, self.columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(batch, channels // 4, 2 * self.rows, 2 * self.columns)  # [B, C, H, W]
        x = x / self.vae.config.scaling_factor + self.vae.config.shift_factor
        image = self.vae.decode(x.to(self.dtype).contiguous(memory_format=self.memory_format), return_dict=False)[0]
        return ((image.float() * 0.5 + 0.5).clamp(0, 1).contiguous(),)


def check_size(pipe: Any, size: Size) -> None:
    """Raises ExportError unless the picture divides into latent patches and the text fits the encoder's limit."""
    patch = pipe.vae_scale_factor * 2
    if size.height % patch or size.width % patch:
        raise ExportError(
            f"shapes.height, shapes.width: expected multiples of {patch} (VAE factor {pipe.vae_scale_factor}, patches of 2), got "
            f"{size.height} x {size.width}; the nearest are {round(size.height / patch) * patch} x {round(size.width / patch) * patch}"
        )
    if not 1 <= size.tokens <= 512:
        raise ExportError(
            f"shapes.max_sequence_length: expected 1 to 512 tokens as FluxPipeline does, got {size.tokens}"
        )


def grid(pipe: Any, size: Size) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    patch = pipe.vae_scale_factor * 2
    return size.height // patch, size.width // patch


def denoiser(pipe: Any, size: Size) -> Component:
    """The transformer behind named flat inputs, with example tensors of the export's shapes."""
    rows, columns = grid(pipe, size)
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    image_ids = pipe._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    module = Denoiser(pipe.transformer, dtype, image_ids, torch.zeros(size.tokens, 3))
    seeded = torch.Generator().manual_seed(0)
    named = {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels, generator=seeded),
        "encoder_hidden_states": torch.randn(1, size.tokens, config.joint_attention_dim, generator=seeded).to(
            pipe.text_encoder_2.dtype
        ),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=seeded).to(
            pipe.text_encoder.dtype
        ),
        "timestep": torch.tensor([0.5]),
    }
    if config.guidance_embeds:
        named["guidance"] = torch.tensor([3.5])
    return Component("denoiser", module.eval(), tuple(named), ("sample",), tuple(named.values()), {"": "transformer."})


def others(pipe: Any, size: Size, *, channels_last: bool) -> tuple[Component, ...]:
    """The two text encoders and the VAE decoder."""
    rows, columns = grid(pipe, size)
    if channels_last:
        pipe.vae.to(memory_format=torch.channels_last)
    clip_ids = torch.zeros(1, pipe.tokenizer_max_length, dtype=torch.int64)
    t5_ids = torch.zeros(1, size.tokens, dtype=torch.int64)
    latents = torch.zeros(1, rows * columns, pipe.transformer.config.in_channels)
    decoder = Decoder(pipe.vae, pipe.vae.dtype, rows, columns, channels_last)
    return (
        Component(
            "text_encoder", PooledText(pipe.text_encoder).eval(), ("input_ids",), ("pooled_projections",), (clip_ids,)
        ),
        Component(
            "text_encoder_2",
            TextStates(pipe.text_encoder_2).eval(),
            ("input_ids",),
            ("encoder_hidden_states",),
            (t5_ids,),
        ),
        Component("vae_decoder", decoder.eval(), ("latents",), ("image",), (latents,)),
    )


def scheduler_arguments(pipe: Any, size: Size, steps: int) -> dict[str, Any]:
    """What `FluxPipeline.__call__` passes to `set_timesteps` besides the number of steps."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    rows, columns = grid(pipe, size)
    config = pipe.scheduler.config
    accepts = type(pipe.scheduler).set_timesteps.__code__.co_varnames
    arguments: dict[str, Any] = {}
    if "sigmas" in accepts and not config.get("use_flow_sigmas", False):
        arguments["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    if "mu" in accepts:
        arguments["mu"] = calculate_shift(
            rows * columns,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
    return arguments


def tokenizers(pipe: Any) -> dict[str, Any]:
    """Artifact path -> fast tokenizer, whose `tokenizer.json` is stored there."""
    return {"tokenizers/tokenizer": pipe.tokenizer, "tokenizers/tokenizer_2": pipe.tokenizer_2}


def facts(pipe: Any, size: Size) -> dict[str, Any]:
    """The manifest's `pipeline` table, which `runtime/families/flux.py` validates and drives."""

    def prompt(name: str, tokenizer: Any, graph: str, output: str, max_length: int) -> dict[str, Any]:
        return {
            "tokenizer": f"tokenizers/{name}/tokenizer.json",
            "graph": graph,
            "output": output,
            "max_length": max_length,
            "pad_id": tokenizer.pad_token_id,
            "pad_token": tokenizer.pad_token,
        }

    rows, columns = grid(pipe, size)
    config = pipe.transformer.config
    return {
        "latents_shape": [config.in_channels // 4, rows * 2, columns * 2],
        "timestep_scale": 0.001,
        "guidance_embeds": bool(config.guidance_embeds),
        "prompts": [
            prompt("tokenizer", pipe.tokenizer, "text_encoder", "pooled_projections", pipe.tokenizer_max_length),
            prompt("tokenizer_2", pipe.tokenizer_2, "text_encoder_2", "encoder_hidden_states", size.tokens),
        ],
    }


def size_of(manifest: Manifest) -> Size:
    """The size that an artifact was exported for."""
    return Size(manifest.defaults.height, manifest.defaults.width, manifest.pipeline["prompts"][-1]["max_length"])


def draw(pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size) -> tuple[Tensor, Tensor]:
    """Final latents [1, N, C] and image [1, 3, H, W] in 0..1 of the plain diffusers call: what an artifact is held against."""
    last: dict[str, Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(tensors)
        return {}

    image = pipe(
        prompt,
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=size.tokens,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        callback_on_step_end=keep,
    ).images
    return last["latents"], image
