"""What compiling changes: one artifact for each family, compiled in float32 without a cache, against diffusers."""

from __future__ import annotations

import pytest

from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime import load
from support.family_parity import FAMILIES, PLAIN, PROMPTS, expected, relative_error, seeded

LIMIT = 1e-4
"""On latents, relative in L2: AOTInductor fuses, and adds in another order; over all steps."""
# UNets and video take minutes; FLUX's other models have dev's graphs but for an input or for the lengths
SLOW = ("sd", "sd2", "sdxl", "sdxl-refiner", "cogvideox", "flux-schnell", "flux-kontext")


def marked(name: str):
    marks = [pytest.mark.works(name, "compiled"), *([pytest.mark.slow] if name in SLOW else [])]
    return pytest.param(name, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("name", [marked(name) for name in FAMILIES])
def test_a_compiled_artifact_draws_what_diffusers_draws(name, tmp_path):
    case = FAMILIES[name]
    recipe = resolve(case.recipe, (*PLAIN, *case.overrides), f"tiny:{case.tiny}")
    with open_progress("quiet") as quiet:
        artifact = export(recipe, tmp_path / "artifact", ExportOptions(verify=False), quiet)
    pipe = load(artifact, cache_dir=tmp_path / "cache")
    latents = expected(name, PROMPTS[0], generator=seeded(1))
    drawn = [pipe(PROMPTS[0], seed=s, output_type="latent", **case.ours)[0] for s in (1, 2)]
    assert relative_error(drawn[0], latents) < LIMIT
    assert relative_error(drawn[1], latents) > 0.1  # the canary: another noise
