"""Tiny random pipelines, one for each family: `--model tiny:flux` makes one, with no download.

Their components are diffusers' and transformers' own classes, small; their weights are drawn, and mean nothing: the
pictures are smooth noise that follows the prompt, the seed and the guidance. They are for trying recipes and for tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TINY_PREFIX = "tiny:"


@dataclass(frozen=True)
class TinyModel:
    """`module` of this package has `build_tiny_pipeline(seed, **arguments)`; `defaults` are what its pipeline is called with."""

    module: str
    defaults: Mapping[str, int | float]
    arguments: Mapping[str, Any] = field(default_factory=dict)


PICTURE_SIZE = {"height": 32, "width": 32}
TINY_MODELS = {
    "flux": TinyModel(
        "flux", {**PICTURE_SIZE, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 3.5}
    ),
    "flux-schnell": TinyModel(
        "flux",
        {**PICTURE_SIZE, "max_sequence_length": 16, "num_inference_steps": 4, "guidance_scale": 0.0},
        {"guidance": False},
    ),
    "flux-kontext": TinyModel(
        "flux_kontext", {**PICTURE_SIZE, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 3.5}
    ),
    "sd": TinyModel("sd", {**PICTURE_SIZE, "num_inference_steps": 8, "guidance_scale": 5.0}),
    "sd2": TinyModel(
        "sd", {**PICTURE_SIZE, "num_inference_steps": 8, "guidance_scale": 5.0}, {"prediction": "v_prediction"}
    ),
    "sdxl": TinyModel("sdxl", {**PICTURE_SIZE, "num_inference_steps": 8, "guidance_scale": 5.0}),
    "sdxl-refiner": TinyModel("sdxl_refiner", {**PICTURE_SIZE, "num_inference_steps": 8, "guidance_scale": 5.0}),
    "sd3": TinyModel(
        "sd3", {**PICTURE_SIZE, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 5.0}
    ),
    "pixart": TinyModel(
        "pixart", {**PICTURE_SIZE, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 4.5}
    ),
    "cogvideox": TinyModel(
        "cogvideox",
        {
            "height": 64,
            "width": 64,
            "num_frames": 9,
            "max_sequence_length": 16,
            "num_inference_steps": 8,
            "guidance_scale": 6.0,
        },
    ),
}


def build_tiny_pipeline(name: str, seed: int = 0) -> Any:
    """The pipeline `name` of `TINY_MODELS`, on the CPU in float32 and eval mode. Raises KeyError for a name that is not there."""
    tiny = TINY_MODELS[name]
    return importlib.import_module(f".{tiny.module}", __name__).build(seed, **tiny.arguments)


def save_tiny_pipeline(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes that pipeline and its defaults as a folder that `--model` accepts, and returns it."""
    return save_pipeline(build_tiny_pipeline(name, seed), folder, TINY_MODELS[name].defaults)


def save_pipeline(pipe: Any, folder: Path, defaults: Mapping[str, int | float]) -> Path:
    """Writes `pipe` with a `prebake.toml` beside it; that is written last."""
    pipe.save_pretrained(folder)
    lines = ["[defaults]", *(f"{key} = {value}" for key, value in defaults.items())]
    (folder / "prebake.toml").write_text("\n".join(lines) + "\n", "utf-8")
    return folder
