"""Pictures, as several families have them: their size, the VAE's two halves as graphs, and the eager call that draws one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

from ...runtime.errors import ExportError
from ...runtime.manifest import Manifest
from ..sites.component import Component

VAE_ENCODER = "vae_encoder"
"""The graph's name."""
PROBE_PIXELS = 64  # a side that every VAE takes


@dataclass(frozen=True)
class Size:
    """The static shapes of one export. `height` and `width` in pixels, `tokens` of text, `frames` of a video."""

    height: int
    width: int
    tokens: int
    frames: int = 1


def read_size(manifest: Manifest) -> Size:
    """The default size of an artifact. Its longest prompt is that of the last tokenizer, unless the family's
    facts say another `max_sequence_length`."""
    defaults, facts = manifest.defaults, manifest.pipeline
    tokens = facts.get("max_sequence_length") or facts["text"]["prompts"][-1]["max_length"]
    return Size(defaults.height, defaults.width, tokens, defaults.num_frames or 1)


def read_sizes(manifest: Manifest) -> dict[str | None, Size]:
    """Name -> size of all that an artifact was exported for; the default one has no name."""
    default = read_size(manifest)
    further = {entry.name: replace(default, height=entry.height, width=entry.width) for entry in manifest.sizes}
    return {None: default, **further}


def accept_steps(pipe: Any, steps: int) -> None:
    """Raises nothing: `check_steps` of pipelines that are the same at any number of steps."""


def no_scheduler_arguments(scheduler: Any, latents_shape: Sequence[int], steps: int) -> dict[str, Any]:
    """Nothing: `scheduler_arguments` of pipelines that pass the number of steps alone, or besides it `eta=0`, the default."""
    refuse_foreign_scheduler(scheduler, "order", "init_noise_sigma")
    return {}


def refuse_foreign_scheduler(
    scheduler: Any, *attributes: str, arguments: Mapping[str, Any] | None = None, earlier: bool = False
) -> None:
    """Raises ExportError for a scheduler with which diffusers' own pipeline ends in an error: it reads `attributes`, passes
    `arguments` to `set_timesteps`, and hands `step` the timestep and the output before only where `earlier`."""
    name = type(scheduler).__name__
    step, takes = (method_parameters(scheduler, method) for method in ("step", "set_timesteps"))
    lacking = [f"has no {key}" for key in ("step", *attributes) if not hasattr(scheduler, key)]
    lacking += [f"takes no {key} in set_timesteps" for key in arguments or {} if key not in takes]
    if not earlier:
        lacking += [f"needs {key} in step" for key in ("timestep_back", "old_pred_original_sample") if key in step]
    if lacking:
        raise ExportError(
            f"sampler.scheduler: diffusers' own pipeline cannot draw with {name}, which {', and '.join(lacking)}; "
            "take the model's own, or another one"
        )


def method_parameters(owner: Any, name: str) -> frozenset[str]:
    """The parameters of a method; none where there is no such method."""
    method = getattr(owner, name, None)
    return frozenset() if method is None else frozenset(inspect.signature(method).parameters)


def check_multiples(size: Size, patch: int, why: str) -> None:
    """Raises ExportError unless both sides are multiples of `patch` pixels; `why` says what makes them so."""
    if size.height % patch or size.width % patch:
        raise ExportError(
            f"shapes.height, shapes.width: expected multiples of {patch} ({why}), got "
            f"{size.height} x {size.width}; the nearest are {round(size.height / patch) * patch} x {round(size.width / patch) * patch}"
        )


def refuse_range(why: str) -> NoReturn:
    """Raises ExportError for a family that has no graph for several sizes."""
    raise ExportError(
        f"shapes.height, shapes.width: expected a number each, got a range: {why}; list the sizes instead, as shapes.sizes"
    )


def find_latent_multiple(unet: Any) -> int:
    """What both sides of a UNet's latents are multiples of, so that all its levels join without a remainder."""
    return 2 ** (len(unet.config.block_out_channels) - 1)


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


class Encoder(nn.Module):
    """float32 image [1, 3, H, W] in -1..1 -> mean and deviation, float32 [1, C, h, w], of its latents.

    Both are scaled and shifted as the loop's latents are: `mean + std * noise` is what diffusers' `retrieve_latents`
    draws and its pipelines scale. Of a VAE that gives latents, and no distribution of them (AutoencoderTiny), the deviation is 0.
    """

    def __init__(self, vae: Any, *, channels_last: bool, shift: float = 0.0) -> None:
        super().__init__()
        self.vae = vae
        self.dtype: torch.dtype = vae.dtype
        self.shift = shift
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.vae.encode(image.to(self.dtype).contiguous(memory_format=self.memory_format), return_dict=False)[
            0
        ]
        scale = self.vae.config.scaling_factor
        latents = (encoded if isinstance(encoded, Tensor) else encoded.mean).float()
        mean = (latents - self.shift) * scale if self.shift else latents * scale
        std = torch.zeros_like(mean) if isinstance(encoded, Tensor) else encoded.std.float() * scale
        return mean.contiguous(), std.contiguous()


def encodes_distribution(vae: Any) -> bool:
    """Whether the VAE's encoder gives a distribution, which diffusers draws latents from, and not the latents themselves."""
    with torch.no_grad():
        pixels = torch.zeros(1, 3, PROBE_PIXELS, PROBE_PIXELS, dtype=vae.dtype, device=vae.device)
        return not isinstance(vae.encode(pixels, return_dict=False)[0], Tensor)


def encoder_component(encoder: nn.Module, height: int, width: int) -> Component:
    """The graph `vae_encoder` for pictures of that size."""
    example = torch.zeros(1, 3, height, width)
    return Component(VAE_ENCODER, encoder.eval(), ("image",), ("mean", "std"), (example,))


def vae_components(
    vae: Any, size: Size, latents: Tensor, decoder: nn.Module, encoder: nn.Module | None, *, channels_last: bool
) -> tuple[Component, ...]:
    """The graph `vae_encoder`, where there is an encoder, and `vae_decoder` last, for one picture of that size and its
    latents. With `channels_last` the VAE's weights lie as N H W C from here on."""
    if channels_last:
        vae.to(memory_format=torch.channels_last)
    return (
        *((encoder_component(encoder, size.height, size.width),) if encoder else ()),
        Component("vae_decoder", decoder.eval(), ("latents",), ("image",), (latents,)),
    )


def example_picture(size: Size, seed: int) -> Image.Image:
    """A picture to start from where one is needed and none is at hand: smooth blots of colour, other ones for each seed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size.height, size.width), mode="bicubic").clamp(0, 1)
    return Image.fromarray((smooth[0].permute(1, 2, 0) * 255).round().byte().numpy())


def call_pipeline(pipe: Any, prompt: str, seed: int, **call: Any) -> tuple[Tensor, Tensor]:
    """Final latents and image [1, 3, H, W] in 0..1, or frames [1, T, 3, H, W], of one plain diffusers call, with noise of a
    generator of that seed."""
    last: dict[str, Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(tensors)
        return {}

    generator = torch.Generator().manual_seed(seed)
    image = pipe(prompt=prompt, generator=generator, output_type="pt", callback_on_step_end=keep, **call)[0]
    return last["latents"], image
