"""The diffusers pipeline and the slim runtime, side by side: one tiny model for each family, loaded once, and what to call
both with. `FAMILIES` is the list that `test_every_family.py` goes through; what is particular is in a file for each."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prebake.exporter.families.picture import Size, example_picture
from prebake.exporter.load import source
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.tiny import TINY_MODELS
from prebake.runtime.pipeline import Pipeline
from support.captured_pipeline import uncompiled

FLOAT32 = ("precision.denoiser=float32", "precision.text_encoders=float32", "precision.vae=float32")
PLAIN = ("cache.method=none", "quantize.method=none", *FLOAT32)
TOLERANCE = 1e-5
"""On latents, relative in L2. The same float32 sums in another order, over all steps: seen are 1e-7 to 2e-6."""
PICTURE = example_picture(Size(32, 32, 0), 3)
PROMPTS = ("a red circle", "the large cat on a blue table", "snow")


@dataclass(frozen=True)
class Case:
    """A tiny model, the recipe that is for its family, and what its diffusers pipeline is called with besides a prompt.

    `negatives`: whether it is guided by a negative prompt. `ours` are arguments of the runtime's call alone.
    """

    tiny: str
    recipe: str
    call: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    negatives: bool = True
    overrides: tuple[str, ...] = ()


FAMILIES = {
    "cogvideox": Case("cogvideox", "cogvideox-fast", {"max_sequence_length": 16}),
    "flux": Case("flux", "flux-fast", {"max_sequence_length": 16}, negatives=False),
    "flux-schnell": Case("flux-schnell", "flux-fast", {"max_sequence_length": 16}, negatives=False),
    "flux-kontext": Case(
        "flux-kontext",
        "flux-kontext-fast",
        # at the picture's own size: without these two diffusers takes both to about a million pixels
        {"max_sequence_length": 16, "image": PICTURE, "max_area": 32 * 32, "_auto_resize": False},
        {"image": PICTURE},
        negatives=False,
    ),
    "sd": Case("sd", "sd-fast"),
    "sd2": Case("sd2", "sd-fast"),
    "sdxl": Case("sdxl", "sdxl-fast"),
    "sdxl-refiner": Case("sdxl-refiner", "sdxl-fast", {"image": PICTURE}, {"image": PICTURE}),
    "sd3": Case("sd3", "sd3-fast", {"max_sequence_length": 16}),
    "pixart": Case(
        "pixart",
        "pixart-fast",
        {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    ),
}


@functools.cache
def eager(tiny: str) -> Any:
    """The model's diffusers pipeline, float32."""
    pipe = source.load_model(f"tiny:{tiny}", None, {"default": torch.float32}).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_kind(kind: type, pipe: Any, **more: Any) -> Any:
    """Another pipeline class of diffusers around the same components: `kind(**components)`."""
    made = kind.from_pipe(pipe, **more)
    made.set_progress_bar_config(disable=True)
    return made


@functools.cache
def ours(name: str, *overrides: str) -> Pipeline:
    """The family's artifact, uncached in float32, with `overrides` of its recipe, uncompiled."""
    case = FAMILIES[name]
    recipe = resolve(case.recipe, (*PLAIN, *case.overrides, *overrides), f"tiny:{case.tiny}")
    folder = Path(tempfile.mkdtemp(prefix="prebake-parity-", dir=os.environ.get("PYTEST_TMP")))
    return uncompiled(recipe, folder)


def expected(name: str, prompt: Any, **call: Any) -> torch.Tensor:
    """diffusers' latents."""
    case, defaults = FAMILIES[name], TINY_MODELS[FAMILIES[name].tiny].defaults
    steps = {"num_inference_steps": defaults["num_inference_steps"], "guidance_scale": defaults["guidance_scale"]}
    size = {n: defaults[n] for n in ("height", "width", "num_frames") if n in defaults}
    return eager(case.tiny)(prompt=prompt, **{**size, **steps, **case.call, "output_type": "latent", **call})[0]


def got(name: str, prompt: Any, *overrides: str, **call: Any) -> torch.Tensor:
    """prebake's latents."""
    return ours(name, *overrides)(prompt, output_type="latent", **{**FAMILIES[name].ours, **call})[0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float((got - expected).norm() / expected.norm())
