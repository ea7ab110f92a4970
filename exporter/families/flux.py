"""FLUX (text to image): which graphs a pipeline becomes, and what the runtime needs to know to drive them.

In: a loaded `FluxPipeline` and a resolved recipe. Out: wrappers with flat, named inputs, example tensors, the facts
that `runtime/families/flux.py` reads back from the manifest, and the arguments that `FluxPipeline.__call__` gives its
scheduler. Latents travel packed and in float32, [1, N, C]; every graph casts inside, so the loop only adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ...runtime.families.flux import IMAGE_IDS, pack_latents, unpack_latents
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

PICTURE = {"strength": 0.6, "rounded": "down", "redrawn": False}
"""What `runtime/families`' `PictureInput` says besides its size: the defaults of `FluxImg2ImgPipeline`."""
EMBEDS = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
DEFAULTS = {"height": 1024, "width": 1024, "max_sequence_length": 512, "num_inference_steps": 28, "guidance_scale": 3.5}


class TokenDenoiser(nn.Module):
    """`FluxTransformer2DModel`: float32 packed latents in, float32 velocity out."""

    def __init__(self, transformer: nn.Module, dtype: torch.dtype, text_ids: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype
        self.register_buffer("text_ids", text_ids)

    def run(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        image_ids: Tensor,
    ) -> Tensor:
        """The velocity of latents whose tokens lie at these positions [N, 3]."""
        with embed_exact_times(self.transformer, timestep, guidance):
            sample = self.transformer(
                hidden_states=hidden_states.to(self.dtype),
                encoder_hidden_states=encoder_hidden_states.to(self.dtype),
                pooled_projections=pooled_projections.to(self.dtype),
                timestep=timestep,
                guidance=guidance,
                img_ids=image_ids,
                txt_ids=self.text_ids,
                return_dict=False,
            )[0]
        return sample.float()


class Denoiser(TokenDenoiser):
    """The transformer with the token positions as constants."""

    def __init__(self, transformer: nn.Module, dtype: torch.dtype, image_ids: Tensor, text_ids: Tensor) -> None:
        super().__init__(transformer, dtype, text_ids)
        self.register_buffer("image_ids", image_ids)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        conditions = (encoder_hidden_states, pooled_projections, timestep, guidance)
        return self.run(hidden_states, *conditions, self.get_buffer("image_ids"))


class RangeDenoiser(TokenDenoiser):
    """The transformer with the token positions as an input, `img_ids` [B, N, 3]: those of one picture are those of all, which are of one
    size."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        conditions = (encoder_hidden_states, pooled_projections, timestep, guidance)
        return self.run(hidden_states, *conditions, img_ids[0])


class TextEncoders(nn.Module):
    """CLIP's and T5's ids [1, L] and [1, T] -> encoder_hidden_states [1, T, D] of T5, pooled_projections [1, P] of CLIP."""

    def __init__(self, clip: nn.Module, t5: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = clip, t5

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.text_encoder(input_ids, output_hidden_states=False).pooler_output
        states = self.text_encoder_2(input_ids_2, output_hidden_states=False)[0]
        return states.contiguous(), pooled.contiguous()


@contextlib.contextmanager
def embed_exact_times(transformer: nn.Module, timestep: Tensor, guidance: Tensor | None) -> Iterator[None]:
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


def defaults(pipe: Any) -> dict[str, Any]:
    """What `FluxPipeline.__call__` takes where its caller is silent."""
    return DEFAULTS


def check_size(pipe: Any, size: Size) -> None:
    """Raises ExportError unless the picture divides into latent patches and the text fits the encoder's limit."""
    check_multiples(size, pipe.vae_scale_factor * 2, f"VAE factor {pipe.vae_scale_factor}, patches of 2")
    if not 1 <= size.tokens <= 512:
        raise ExportError(
            f"shapes.max_sequence_length: expected 1 to 512 tokens as FLUX's pipelines do, got {size.tokens}"
        )
    refuse_attention_masks(pipe, "text_encoder")


def token_grid(pipe: Any, size: Size) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    patch = pipe.vae_scale_factor * 2
    return size.height // patch, size.width // patch


def denoiser(pipe: Any, size: Size, guidance: Guidance = GUIDANCE) -> Component:
    """The transformer behind named flat inputs, with example tensors of the export's shapes; with `true_cfg`, both
    branches of it."""
    module = Denoiser(
        pipe.transformer, pipe.transformer.dtype, token_positions(pipe, size), torch.zeros(size.tokens, 3)
    )
    return denoiser_component(module, example_inputs(pipe, size), guidance)


def range_unit(pipe: Any) -> int:
    """Pixels that both sides are multiples of at every size of a range."""
    return pipe.vae_scale_factor * 2


def range_denoiser(pipe: Any, size: Size, guidance: Guidance = GUIDANCE) -> Component:
    """`denoiser` with the tokens' positions among its inputs."""
    named = example_inputs(pipe, size)
    embedded = {"guidance": named.pop("guidance")} if "guidance" in named else {}
    positions = token_positions(pipe, size)
    module = RangeDenoiser(pipe.transformer, pipe.transformer.dtype, torch.zeros(size.tokens, 3))
    return denoiser_component(module, {**named, IMAGE_IDS: positions[None], **embedded}, guidance)


def token_positions(pipe: Any, size: Size) -> Tensor:
    """The latents' tokens as [N, 3] of (0, row, column)."""
    return pipe._prepare_latent_image_ids(1, *token_grid(pipe, size), "cpu", torch.float32)


def example_inputs(pipe: Any, size: Size) -> dict[str, Tensor]:
    """The denoiser's inputs by name, in the order of its `forward`."""
    rows, columns = token_grid(pipe, size)
    config = pipe.transformer.config
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
    return named


def denoiser_component(
    module: nn.Module, named: dict[str, Tensor], guidance: Guidance, transformer: str = "transformer."
) -> Component:
    """The module with these inputs, once or as the two branches of true guidance; `transformer` is where that lies in it."""
    branch = Component("denoiser", module.eval(), tuple(named), ("sample",), tuple(named.values()), {"": transformer})
    if not guidance.true_cfg:
        return branch
    return add_guidance(branch, tuple(EMBEDS.values()), batched=guidance.batched)


def prompt_entries(pipe: Any, size: Size) -> list[dict[str, Any]]:
    """The manifest's prompt entries for CLIP, then T5."""
    return [
        prompt_entry("tokenizer", pipe.tokenizer, pipe.tokenizer_max_length, inversions=True),
        prompt_entry("tokenizer_2", pipe.tokenizer_2, size.tokens, inversions=True),
    ]


def other_components(pipe: Any, size: Size, *, channels_last: bool, picture: bool = False) -> tuple[Component, ...]:
    """The two text encoders in one graph, with `picture` the VAE's encoder, and its decoder last."""
    rows, columns = token_grid(pipe, size)
    latents = torch.zeros(1, rows * columns, pipe.transformer.config.in_channels)
    unpack = partial(unpack_latents, h=2 * rows, w=2 * columns)
    return build_components(pipe, size, latents, channels_last=channels_last, picture=picture, arranged=unpack)


def range_components(pipe: Any, size: Size, *, channels_last: bool, picture: bool = False) -> tuple[Component, ...]:
    """`other_components`, with a decoder of latents that are not packed."""
    latents = torch.zeros(1, *facts(pipe, size)["latents_shape"])
    return build_components(pipe, size, latents, channels_last=channels_last, picture=picture)


def build_components(
    pipe: Any,
    size: Size,
    latents: Tensor,
    *,
    channels_last: bool,
    picture: bool,
    arranged: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> tuple[Component, ...]:
    """The text encoders and the VAE's halves, whose decoder takes such latents, and first arranges them."""
    shift = pipe.vae.config.shift_factor
    decoder = Decoder(pipe.vae, channels_last=channels_last, shift=shift, arranged=arranged)
    encoder = Encoder(pipe.vae, channels_last=channels_last, shift=shift) if picture else None
    return (
        text_component(TextEncoders(pipe.text_encoder, pipe.text_encoder_2), prompt_entries(pipe, size), EMBEDS),
        *vae_components(pipe.vae, size, latents, decoder, encoder, channels_last=channels_last),
    )


check_steps = accept_steps


def scheduler_arguments(scheduler: Any, latents_shape: Sequence[int], steps: int) -> dict[str, Any]:
    """What `FluxPipeline.__call__` passes to `set_timesteps` besides the number of steps."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    if getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
        raise ExportError(
            "sampler.scheduler: expected one that starts from noise of deviation 1, as FluxPipeline does, got "
            f"{type(scheduler).__name__}; take FlowMatchEulerDiscreteScheduler"
        )
    _, h, w = latents_shape
    config = scheduler.config
    arguments: dict[str, Any] = {}
    if not config.get("use_flow_sigmas", False):
        arguments["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    arguments["mu"] = calculate_shift(
        (h // 2) * (w // 2),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    refuse_foreign_scheduler(scheduler, "order", arguments=arguments)
    return arguments


def facts(pipe: Any, size: Size) -> dict[str, Any]:
    """The manifest's `pipeline` table, which `runtime/families` validates and drives."""
    rows, columns = token_grid(pipe, size)
    return {
        "latents_shape": [pipe.transformer.config.in_channels // 4, rows * 2, columns * 2],
        "timestep_scale": 0.001,
        "text": {"prompts": prompt_entries(pipe, size), "embeds": EMBEDS},
    }


def encode(
    pipe: Any, size: Size, prompt: str, guidance_scale: float, guidance: Guidance = GUIDANCE
) -> dict[str, Tensor]:
    """The denoiser's inputs that are equal at every step, from the pipeline's own encoders. With `true_cfg` both
    branches get the prompt, as where there is no negative one."""
    states, pooled, _ = pipe.encode_prompt(prompt, prompt, max_sequence_length=size.tokens)
    inputs = dict(zip(EMBEDS.values(), (states, pooled), strict=True))
    embedded = {"guidance": torch.tensor([guidance_scale])} if pipe.transformer.config.guidance_embeds else {}
    if not guidance.true_cfg:
        return {**inputs, **embedded}
    return {
        **{n: torch.stack((t, t), dim=1) for n, t in inputs.items()},
        **embedded,
        "guidance_scale": torch.tensor([1.0]),
    }


def noise(pipe: Any, size: Size, generator: torch.Generator) -> Tensor:
    """Packed standard normal latents [1, N, C], the numbers that the pipeline draws."""
    rows, columns = token_grid(pipe, size)
    shape = (1, pipe.transformer.config.in_channels // 4, 2 * rows, 2 * columns)
    return pack_latents(torch.randn(shape, generator=generator))


def draw(pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size) -> tuple[Tensor, Tensor]:
    """Final latents [1, N, C] and image [1, 3, H, W] in 0..1 of the plain diffusers call: what an artifact is held against."""
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
