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
    """`module` of this package has `build(seed, **arguments)`; the rest is what its pipeline is called with."""

    module: str
    guidance_scale: float
    num_inference_steps: int = 8
    max_sequence_length: int | None = 16
    num_frames: int | None = None
    side: int = 32
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, int | float]:
        """The arguments of the pipeline's call; those that it does not take are left out."""
        call = {
            "height": self.side,
            "width": self.side,
            "num_frames": self.num_frames,
            "max_sequence_length": self.max_sequence_length,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }
        return {name: value for name, value in call.items() if value is not None}


TINY_MODELS = {
    "flux": TinyModel("flux", 3.5),
    "flux-schnell": TinyModel("flux", 0.0, num_inference_steps=4, arguments={"guidance": False}),
    "flux-kontext": TinyModel("flux_kontext", 3.5),
    "sd": TinyModel("sd", 5.0, max_sequence_length=None),
    "sd2": TinyModel("sd", 5.0, max_sequence_length=None, arguments={"prediction": "v_prediction"}),
    "sdxl": TinyModel("sdxl", 5.0, max_sequence_length=None),
    "sdxl-refiner": TinyModel("sdxl_refiner", 5.0, max_sequence_length=None),
    "sd3": TinyModel("sd3", 5.0),
    "pixart": TinyModel("pixart", 4.5),
    "cogvideox": TinyModel("cogvideox", 6.0, num_frames=9, side=64),
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
