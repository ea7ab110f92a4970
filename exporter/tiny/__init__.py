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

PREFIX = "tiny:"


@dataclass(frozen=True)
class Tiny:
    """`module` of this package has `build(seed, **arguments)`; `defaults` are what its pipeline is called with."""

    module: str
    defaults: Mapping[str, int | float]
    arguments: Mapping[str, Any] = field(default_factory=dict)


PICTURE = {"height": 32, "width": 32}
NAMES = {
    "flux": Tiny("flux", {**PICTURE, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 3.5}),
    "flux-schnell": Tiny(
        "flux",
        {**PICTURE, "max_sequence_length": 16, "num_inference_steps": 4, "guidance_scale": 0.0},
        {"guidance": False},
    ),
    "flux-kontext": Tiny(
        "flux_kontext", {**PICTURE, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 3.5}
    ),
    "sd": Tiny("sd", {**PICTURE, "num_inference_steps": 8, "guidance_scale": 5.0}),
    "sd2": Tiny("sd", {**PICTURE, "num_inference_steps": 8, "guidance_scale": 5.0}, {"prediction": "v_prediction"}),
    "sdxl": Tiny("sdxl", {**PICTURE, "num_inference_steps": 8, "guidance_scale": 5.0}),
    "sdxl-refiner": Tiny("sdxl_refiner", {**PICTURE, "num_inference_steps": 8, "guidance_scale": 5.0}),
    "sd3": Tiny("sd3", {**PICTURE, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 5.0}),
    "pixart": Tiny("pixart", {**PICTURE, "max_sequence_length": 16, "num_inference_steps": 8, "guidance_scale": 4.5}),
    "cogvideox": Tiny(
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


def build(name: str, seed: int = 0) -> Any:
    """The pipeline `name` of `NAMES`, on the CPU in float32 and eval mode. Raises KeyError for a name that is not there."""
    tiny = NAMES[name]
    return importlib.import_module(f".{tiny.module}", __name__).build(seed, **tiny.arguments)


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes that pipeline and its defaults as a folder that `--model` accepts, and returns it."""
    return save_pipeline(build(name, seed), folder, NAMES[name].defaults)


def save_pipeline(pipe: Any, folder: Path, defaults: Mapping[str, int | float]) -> Path:
    """Writes `pipe` with a `prebake.toml` beside it; that is written last."""
    pipe.save_pretrained(folder)
    lines = ["[defaults]", *(f"{key} = {value}" for key, value in defaults.items())]
    (folder / "prebake.toml").write_text("\n".join(lines) + "\n", "utf-8")
    return folder
