"""Begin: the latents that a call starts from. Noise alone, or a picture with as much noise as the plan has at that step.

The picture goes through the graph `vae_encoder` to latents; a plan's `marginal` says how much of them and of the noise an
evaluation starts from, and a plan's tail is the loop from there on. With a mask, the part of the latents that stays is
set to the picture's again after every step, as noisy as the next step expects. All draws are in the order of diffusers'
pipelines, so that equal generators give equal pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .artifact import Artifact, BoundGraph
from .call.arguments import describe_argument
from .errors import RequestError
from .families import WHOLE_SCHEDULE, Family, PictureInput, ScheduleWindow
from .noise import Generators, draw_noise
from .pictures import preprocess_masks, preprocess_pictures
from .plan import Plan
from .replay import PlanTables, Tensors, is_step_end

Blend = Callable[[int, torch.Tensor], torch.Tensor]
AfterStep = Callable[[int, float, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StartRequest:
    """A caller's image, mask, strength and latents, None where it was silent, and the part of the schedule that it asked for."""

    image: Any = None
    mask_image: Any = None
    strength: float | None = None
    latents: torch.Tensor | None = None
    window: ScheduleWindow = WHOLE_SCHEDULE


@dataclass(frozen=True)
class InitialState:
    """Latents [B, ...] before the first step, further inputs [B, ...] of the denoiser, and what an unmasked part returns to:
    `mask` [B, 1, h, w] is 1 where to draw."""

    latents: torch.Tensor
    inputs: Tensors = field(default_factory=dict)
    plan: Plan | None = None
    image: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def blend(self, group: slice) -> Blend | None:
        """For these images: (evaluation, latents after it) to latents whose unmasked part is the picture's. None without a mask."""
        if self.plan is None or self.image is None or self.noise is None or self.mask is None:
            return None
        plan, image, noise, mask = self.plan, self.image[group], self.noise[group], self.mask[group]

        def blended(e: int, latents: torch.Tensor) -> torch.Tensor:
            known = add_noise(plan, e + 1, image, noise)
            return (1 - mask) * known + mask * latents

        return blended


def steps_to_skip(family: Family, asked: StartRequest) -> Callable[[Plan], int]:
    """A function from a plan to the number of steps that the call leaves out. Raises RequestError for what cannot begin so."""
    picture = family.settings.picture
    if asked.image is None:
        if picture and picture.required:
            raise RequestError("image: expected a picture to begin with, got none; this model draws nothing without")
        if lone := [n for n in ("mask_image", "strength") if getattr(asked, n) is not None]:
            raise RequestError(f"{lone[0]}: expected an image with it, got none")
        if asked.window.begin is not None:
            raise RequestError("denoising_start: expected an image with it, the latents that are done so far, got none")
        return lambda plan: 0
    if picture is None:
        raise RequestError(
            "image: the artifact was exported without image-to-image; export again with sampler.image_to_image=true"
        )
    if asked.mask_image is not None and picture.inpaint_strength is None:
        raise RequestError("mask_image: artifacts of this family do not take it")
    if picture.role == "reference":
        if asked.strength is not None:
            raise RequestError("strength: this model looks at the image and starts from noise; leave the argument out")
        return lambda plan: 0
    if (timestep := asked.window.begin) is not None:
        if asked.strength is not None:
            raise RequestError("expected either strength or denoising_start, got both: each says where to begin")
        return lambda plan: steps_done_at(plan, timestep)
    strength = effective_strength(picture, asked)
    if strength is None or not 0 <= strength <= 1:
        raise RequestError(f"strength={strength}: expected a number from 0 (the image stays) to 1 (it does not matter)")
    chosen = strength

    def left_out(plan: Plan) -> int:
        steps = plan.steps
        if picture.rounded == "down":
            step = int(max(steps - min(steps * chosen, steps), 0))
        else:
            step = max(steps - min(int(steps * chosen), steps), 0)
        if step >= steps:
            raise RequestError(
                f"strength={chosen}: of {steps} steps none is left to take; give at least {math.ceil(1000 / steps) / 1000:g}"
            )
        return step

    return left_out


def effective_strength(picture: PictureInput, asked: StartRequest) -> float | None:
    """The caller's strength, or the default of the picture input."""
    if asked.strength is not None:
        return asked.strength
    return picture.strength if asked.mask_image is None else picture.inpaint_strength


def steps_done_at(plan: Plan, timestep: float) -> int:
    """How many steps are over once the timesteps from `timestep` up are done. A step of two evaluations that is half over
    is left to do."""
    done = sum(e.timestep >= timestep for e in plan.evaluations)
    if done == len(plan.evaluations):
        raise RequestError(f"denoising_start: of {plan.steps} steps none is left to take; give less")
    return max((tail.step for tail in plan.tails if tail.begin <= done), default=0)


def tables_until(tables: PlanTables, timestep: float | None) -> PlanTables:
    """The tables of the evaluations whose timesteps are not below `timestep`, all for None."""
    if timestep is None:
        return tables
    plan = tables.plan
    count = sum(e.timestep >= timestep for e in plan.evaluations)
    if count == 0:
        raise RequestError(f"denoising_end: of {plan.steps} steps none is to be taken; give more")
    kept = plan.evaluations[:count]
    plan = plan.model_copy(update={"evaluations": kept, "steps": kept[-1].step + 1, "tails": ()})
    return replace(tables, plan=plan, timesteps=tables.timesteps[:count], coefficients=tables.coefficients[:count])


def initial_state(
    family: Family, artifact: Artifact, plan: Plan, asked: StartRequest, batch: int, generator: Generators
) -> InitialState:
    """Where the call starts: float32 latents [batch, ...] on the artifact's device."""
    if asked.image is None or (picture := family.settings.picture) is None:
        return InitialState(noise_latents(family, artifact, plan, asked, batch, generator))
    pixels = picture_pixels(family, picture, asked.image, batch)
    image = picture_latents(family, artifact, picture, asked, pixels, batch, generator)
    if picture.role == "reference":
        return InitialState(noise_latents(family, artifact, plan, asked, batch, generator), {"image_latents": image})
    if asked.latents is not None:
        raise RequestError(
            "expected either image or latents, got both: the latents that a picture starts from follow from it"
        )
    if plan.evaluations[0].marginal is None:
        raise RequestError(
            f"image: {plan.scheduler} has no way to add noise to a picture; export with another scheduler"
        )
    done = asked.window.begin is not None  # then the picture is already as noisy as it should be
    if done and asked.mask_image is None:
        return InitialState(image)
    noise = family.draw_latents(batch, generator).to(artifact.device)
    if asked.mask_image is None:
        return InitialState(add_noise(plan, 0, image, noise))
    if done:
        latents = image
    elif effective_strength(picture, asked) == 1:
        latents = plan.init_noise_sigma * noise
    else:
        latents = add_noise(plan, 0, image, noise)
    h, w = family.settings.latents_shape[-2:]
    mask = preprocess_masks(asked.mask_image, picture.height, picture.width, h, w).to(artifact.device)
    if batch % len(mask):
        raise RequestError(f"mask_image: expected one mask, or a number that divides {batch}; got {len(mask)}")
    if picture.sampled and pixels.shape[1:] != family.settings.latents_shape:
        # diffusers draws here for the latents of the masked pictures, which go unused
        masked = max(len(pixels), len(mask))
        draw_noise((masked, *family.settings.latents_shape), first_generators(generator, masked))
    return InitialState(latents, plan=plan, image=image, noise=noise, mask=mask.repeat(batch // len(mask), 1, 1, 1))


def noise_latents(
    family: Family, artifact: Artifact, plan: Plan, asked: StartRequest, batch: int, generator: Generators
) -> torch.Tensor:
    """The caller's latents or drawn ones, as the plan's first step expects them."""
    shape = (batch, *family.latents_shape)
    latents = family.draw_latents(batch, generator) if asked.latents is None else asked.latents
    if not isinstance(latents, torch.Tensor) or not latents.dtype.is_floating_point:
        got = latents.dtype if isinstance(latents, torch.Tensor) else describe_argument(latents)
        raise RequestError(f"latents: expected a tensor of floats, got {got}")
    if tuple(latents.shape) != shape:
        raise RequestError(f"latents: expected {family.latents_name} {list(shape)}, got {list(latents.shape)}")
    latents = latents.to(artifact.device, torch.float32).contiguous()
    return latents if plan.init_noise_sigma == 1.0 else latents * plan.init_noise_sigma


def picture_pixels(family: Family, picture: PictureInput, image: Any, batch: int) -> torch.Tensor:
    """The caller's P pictures [P, 3, H, W] in -1..1, or their latents [P, C, h, w]: a tensor that has the latents' channels
    is taken for them. P divides `batch`."""
    if isinstance(image, torch.Tensor) and image.shape[-3] == family.settings.latents_shape[0] != 3:
        pixels = image.reshape(-1, *image.shape[-3:]).float()
        if pixels.shape[1:] != family.settings.latents_shape:
            shape = [len(pixels), *family.settings.latents_shape]
            raise RequestError(f"image: expected a picture, or latents {shape}, got {list(pixels.shape)}")
    else:
        pixels = preprocess_pictures(image, picture.height, picture.width)
    if batch % len(pixels):
        raise RequestError(f"image: expected one picture, or a number that divides {batch}; got {len(pixels)}")
    return pixels


def picture_latents(
    family: Family,
    artifact: Artifact,
    picture: PictureInput,
    asked: StartRequest,
    pixels: torch.Tensor,
    batch: int,
    generator: Generators,
) -> torch.Tensor:
    """Latents of `picture_pixels`, as the loop has them: float32 [batch, ...]. Fewer than `batch` are repeated, all of them in
    turn, as in diffusers; before they are drawn where each image has a generator, but not so in inpainting."""
    if isinstance(generator, Sequence) and picture.redrawn and asked.mask_image is None:
        pixels = pixels.repeat(batch // len(pixels), 1, 1, 1)
    latents = pixels
    if pixels.shape[1:] != family.settings.latents_shape:
        latents = encode_pictures(
            artifact.graph(family.graph_name("vae_encoder")),
            artifact.device,
            picture,
            pixels,
            family.settings.latents_shape,
            first_generators(generator, len(pixels)),
        )
    latents = latents.repeat(batch // len(latents), 1, 1, 1)
    return family.arranged(latents.to(artifact.device)).contiguous()


def first_generators(generator: Generators, count: int) -> Generators:
    """The first `count` of a list of generators; one generator, or None, as it is."""
    return generator[:count] if isinstance(generator, Sequence) else generator


def encode_pictures(
    encode: BoundGraph,
    device: torch.device,
    picture: PictureInput,
    pixels: torch.Tensor,
    shape: Sequence[int],
    generator: Generators,
) -> torch.Tensor:
    """[P, 3, H, W] in -1..1 to latents [P, *shape], drawn from the encoder's distribution or its mean."""
    halves = [encode({"image": one.to(device).contiguous()}) for one in pixels.float().split(1)]
    mean, std = (torch.cat([half[name] for half in halves]) for name in ("mean", "std"))
    return mean + std * draw_noise((len(pixels), *shape), generator).to(device) if picture.sampled else mean


def add_noise(plan: Plan, e: int, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The picture with as much noise as evaluation e starts from; after the last one there is none."""
    a, b = (1.0, 0.0) if e == len(plan.evaluations) else plan.evaluations[e].marginal or (1.0, 0.0)
    return a * image + b * noise


def evaluation_callback(
    plan: Plan, blend: Blend | None, after_step: AfterStep | None
) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None:
    """What `replay` calls after each evaluation: the blend, then, at the end of a step, the caller's own."""
    if blend is None and after_step is None:
        return None

    def seen(e: int, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        evaluation = plan.evaluations[e]
        if blend:
            latents = blend(e, latents)
        if after_step and is_step_end(plan, e):
            latents = after_step(evaluation.step, evaluation.timestep, latents)
        return latents

    return seen
