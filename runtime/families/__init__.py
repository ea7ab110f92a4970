"""Families: what one kind of pipeline needs around the loop, a module each. The manifest's `family` names it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from ..artifact import Artifact
from ..errors import ArtifactError, misfit
from ..noise import Generators
from ..replay import Tensors

FAMILIES = {"flux": "Flux", "sd": "StableDiffusion"}
SettingsT = TypeVar("SettingsT", bound=BaseModel)


class Family(Protocol):
    """What `Pipeline` asks of a family, which is made of an open artifact.

    `arguments` are those of diffusers' `__call__` that say what to draw; `latents_shape` is that of one image in the
    loop, without the batch, and `latents_name` what to call it; `max_sequence_length` is in tokens.
    """

    arguments: tuple[str, ...]
    latents_name: str
    latents_shape: tuple[int, ...]
    max_sequence_length: int

    def conditions(self, given: Mapping[str, Any], guidance_scale: float) -> list[Tensors]:
        """The denoiser's inputs that are equal at every step, one dict for each prompt. `given` are the arguments that
        the caller gave. Raises ArtifactError for a combination of them that says nothing."""
        ...

    def draw_latents(self, batch: int, generator: Generators) -> torch.Tensor:
        """Standard normal noise, float32 [B, *latents_shape] on the CPU, the numbers that diffusers draws."""
        ...


def family_of(artifact: Artifact) -> Family:
    """The artifact's family. Raises ArtifactError for one that is not known, or settings that are not to its schema."""
    name = artifact.manifest.family
    if name not in FAMILIES:
        raise ArtifactError(
            f"{artifact.folder}: family {name!r} is not one that this runtime replays: {', '.join(FAMILIES)}"
        )
    return getattr(importlib.import_module(f".{name}", __name__), FAMILIES[name])(artifact)


def read_settings(kind: type[SettingsT], artifact: Artifact) -> SettingsT:
    """`manifest.pipeline`, checked. Raises ArtifactError naming the first field that is wrong."""
    try:
        return kind.model_validate(artifact.manifest.pipeline)
    except ValidationError as e:
        raise ArtifactError(f"{misfit('manifest.json', e, 'pipeline')}; export again") from e
