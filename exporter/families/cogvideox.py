"""CogVideoX (text to video): which graphs a pipeline becomes, and what the runtime needs to know to drive them.

In: a loaded `CogVideoXPipeline` and a resolved recipe. Out: wrappers with flat, named inputs, example tensors, and the
facts that `runtime/families` reads back from the manifest. Letters: T frames of H x W pixels; t, h and w of their
latents, C channels. Latents travel as [1, t, C, h, w] in float32; both branches of classifier-free guidance are in the
denoiser's graph. Positions are constants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ..recipe.schema import GUIDANCE, Guidance
from ..sites.component import Component
from ..sites.guidance import add_guidance
from .picture import Size, accept_steps, call_pipeline, check_multiples, refuse_foreign_scheduler, refuse_range
from .text import TextStates, prompt_entry, text_component

PICTURE = None
"""No pipeline of this family begins from a picture here."""
EMBEDS = {"prompt_embeds": "encoder_hidden_states"}


class Denoiser(nn.Module):
    """`CogVideoXTransformer3DModel` of one branch: float32 latents [1, t, C, h, w] in, float32 velocity (or noise) out.

    `rotary` is the cosines and sines of all positions, both [N, D], where the model turns its queries and keys;
    `position_embeddings` [1, L + N, D] is added to text and frames, where the model's own are for another size. The sinusoids are of
    float32 timesteps in any dtype: diffusers casts behind them.
    """

    cos: Tensor | None
    sin: Tensor | None
    positions: Tensor | None

    def __init__(
        self,
        transformer: nn.Module,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor] | None,
        positions: Tensor | None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype
        self.register_buffer("positions", positions)
        cos, sin = (None, None) if rotary is None else rotary
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        with replace_positions(self.transformer.get_submodule("patch_embed"), self.positions):
            sample = self.transformer(
                hidden_states=hidden_states.to(self.dtype),
                encoder_hidden_states=encoder_hidden_states.to(self.dtype),
                timestep=timestep,
                image_rotary_emb=None if self.cos is None else (self.cos, self.sin),
                return_dict=False,
            )[0]
        return sample.float()


@contextlib.contextmanager
def replace_positions(embed: Any, positions: Tensor | None) -> Iterator[None]:
    """Inside, `CogVideoXPatchEmbed` takes these positions for another size than the model's, and does not compute them
    anew, which torch.export cannot trace (seen with torch 2.13)."""
    if positions is None:
        yield
        return
    embed._get_positional_embeddings = lambda *size, **_: positions
    try:
        yield
    finally:
        del embed._get_positional_embeddings


class Decoder(nn.Module):
    """float32 latents [1, t, C, h, w] -> float32 frames [1, T, 3, H, W] in 0..1.

    Scaling, `decode` (two or three latent frames at a time, each convolution handing its last inputs on to the next
    time) and `VideoProcessor`'s denormalization in one graph. `padding` latent frames at the beginning are not shown.
    """

    def __init__(self, vae: Any, padding: int) -> None:
        super().__init__()
        self.vae = vae
        self.dtype: torch.dtype = vae.dtype
        self.padding = padding

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        x = latents[:, self.padding :].permute(0, 2, 1, 3, 4) / self.vae.config.scaling_factor
        video = self.vae.decode(x.to(self.dtype).contiguous(), return_dict=False)[0]  # [1, 3, T, H, W]
        return ((video.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4).contiguous(),)


def defaults(pipe: Any) -> dict[str, Any]:
    """What `CogVideoXPipeline.__call__` takes where its caller is silent."""
    config = pipe.transformer.config
    return {
        "height": config.sample_height * pipe.vae_scale_factor_spatial,
        "width": config.sample_width * pipe.vae_scale_factor_spatial,
        "num_frames": config.sample_frames,
        "max_sequence_length": 226,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
    }


def check_size(pipe: Any, size: Size) -> None:
    """Raises ExportError unless frames, pixels and tokens are as the model can have them, and it is one for text alone."""
    config, factor = pipe.transformer.config, pipe.vae_scale_factor_spatial
    if config.ofs_embed_dim:
        raise ExportError(
            f"transformer.config.ofs_embed_dim: expected none, got {config.ofs_embed_dim}: such models continue a picture, "
            "which is not exported"
        )
    check_multiples(size, factor * config.patch_size, f"VAE factor {factor}, patches of {config.patch_size}")
    if config.use_learned_positional_embeddings:
        own = (config.sample_height * factor, config.sample_width * factor)
        if (size.height, size.width) != own:
            raise ExportError(
                f"shapes.height, shapes.width: expected {own[0]} x {own[1]}, for which the model learned its positions, got "
                f"{size.height} x {size.width}"
            )
    if not config.use_rotary_positional_embeddings or config.use_learned_positional_embeddings:
        check_tokens(size, config.max_text_seq_length)
    check_frames(size, pipe.vae_scale_factor_temporal)


def check_tokens(size: Size, tokens: int) -> None:
    """Raises ExportError unless there are `tokens` of text: the positions added to text and frames begin behind them."""
    if size.tokens != tokens:
        raise ExportError(
            f"shapes.max_sequence_length: expected {tokens} tokens, as many as the model's positions leave for the text, "
            f"got {size.tokens}"
        )


def check_frames(size: Size, factor: int) -> None:
    """Raises ExportError for a number of frames that diffusers would change: 10 become 9, and 13 become 16."""
    pair = 2 * factor
    if size.frames % pair > 1:
        lower = size.frames // pair * pair + 1
        raise ExportError(
            f"shapes.num_frames: expected a multiple of {pair}, or one more, as the VAE decodes them; got {size.frames}, the "
            f"nearest are {lower} and {lower + pair - 1}"
        )


def latent_frames(pipe: Any, size: Size) -> tuple[int, int]:
    """Latent frames of a video, and how many come before them because the model takes `patch_size_t` at a time."""
    shown = (size.frames - 1) // pipe.vae_scale_factor_temporal + 1
    return shown, -shown % (pipe.transformer.config.patch_size_t or 1)


def latents_shape(pipe: Any, size: Size) -> tuple[int, int, int, int]:
    """Shape of a video's latents: [t, C, h, w]."""
    factor = pipe.vae_scale_factor_spatial
    channels = pipe.transformer.config.in_channels
    return sum(latent_frames(pipe, size)), channels, size.height // factor, size.width // factor


def position_embeddings(pipe: Any, size: Size) -> Tensor | None:
    """[1, L + N, D] to add to L text tokens and the N of this size; None where the model adds none, or has them itself."""
    config, embed = pipe.transformer.config, pipe.transformer.patch_embed
    t, _, h, w = latents_shape(pipe, size)
    frames = (t - 1) * config.temporal_compression_ratio + 1
    own = (config.sample_height, config.sample_width, config.sample_frames)
    added = embed.use_positional_embeddings or embed.use_learned_positional_embeddings
    return embed._get_positional_embeddings(h, w, frames) if added and (h, w, frames) != own else None


def denoiser(pipe: Any, size: Size, guidance: Guidance = GUIDANCE) -> Component:
    """The transformer's two branches behind named flat inputs, with example tensors of the export's shapes."""
    config, shape = pipe.transformer.config, latents_shape(pipe, size)
    rotary = None
    if config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(size.height, size.width, shape[0], torch.device("cpu"))
    seeded = torch.Generator().manual_seed(0)
    states = torch.randn(1, size.tokens, config.text_embed_dim, generator=seeded)
    named = {
        "hidden_states": torch.randn(1, *shape, generator=seeded),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": states.to(pipe.text_encoder.dtype),
    }
    module = Denoiser(pipe.transformer, pipe.transformer.dtype, rotary, position_embeddings(pipe, size)).eval()
    branch = Component("denoiser", module, tuple(named), ("sample",), tuple(named.values()), {"": "transformer."})
    return add_guidance(branch, tuple(EMBEDS.values()), batched=guidance.batched)


def prompt_entries(pipe: Any, size: Size) -> list[dict[str, Any]]:
    """The manifest's prompt entry for T5."""
    return [prompt_entry("tokenizer", pipe.tokenizer, size.tokens)]


def other_components(pipe: Any, size: Size, *, channels_last: bool, picture: bool = False) -> tuple[Component, ...]:
    """The text encoder, and the VAE's decoder last, whose tensors have five dimensions and no `channels_last`."""
    decoder = Decoder(pipe.vae, latent_frames(pipe, size)[1]).eval()
    latents = torch.zeros(1, *latents_shape(pipe, size))
    return (
        text_component(TextStates(pipe.text_encoder), prompt_entries(pipe, size), EMBEDS),
        Component("vae_decoder", decoder, ("latents",), ("frames",), (latents,)),
    )


def range_unit(pipe: Any) -> int:
    """Raises ExportError: its positions are tables of one size."""
    refuse_range("CogVideoX has its positions as tables of one size")


range_denoiser, range_components = denoiser, other_components
check_steps = accept_steps


def scheduler_arguments(scheduler: Any, latents_shape: Sequence[int], steps: int) -> dict[str, Any]:
    """Nothing; `step` of CogVideoXDPMScheduler is given the timestep and the output before."""
    refuse_foreign_scheduler(scheduler, "order", "init_noise_sigma", earlier=True)
    return {}


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
    states, negative = pipe.encode_prompt(
        prompt, do_classifier_free_guidance=guidance_scale > 1, max_sequence_length=size.tokens, device="cpu"
    )
    other = states if negative is None else negative
    return {
        "encoder_hidden_states": torch.stack((other, states), dim=1),
        "guidance_scale": torch.tensor([max(guidance_scale, 1.0)]),
    }


def noise(pipe: Any, size: Size, generator: torch.Generator) -> Tensor:
    """Standard normal latents [1, t, C, h, w], the numbers that the pipeline draws."""
    return torch.randn(1, *latents_shape(pipe, size), generator=generator)


def draw(pipe: Any, prompt: str, seed: int, steps: int, guidance_scale: float, size: Size) -> tuple[Tensor, Tensor]:
    """Final latents [1, t, C, h, w] and frames [1, T, 3, H, W] in 0..1 of the plain diffusers call: what an artifact is
    held against."""
    return call_pipeline(
        pipe,
        prompt,
        seed,
        height=size.height,
        width=size.width,
        num_frames=size.frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=size.tokens,
    )
