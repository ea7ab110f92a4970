"""Which family exports which diffusers pipeline."""

from __future__ import annotations

import importlib
from typing import Any

from ...runtime.errors import ExportError

FAMILIES = {
    "CogVideoXPipeline": "cogvideox",
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "flux_kontext",
    "StableDiffusionPipeline": "sd",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLPipeline": "sdxl",
}


def find_family(pipe: Any) -> Any:
    """The family module of a pipeline. Raises ExportError with those that exist."""
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ExportError(
            f'pipeline {name} has no family here: its denoiser alone can be exported, which model.part = "denoiser" says; '
            f"pipelines with one: {', '.join(sorted(FAMILIES))}"
        )
    return importlib.import_module(f".{FAMILIES[name]}", __package__)
