"""What compiling changes: one artifact for each family, compiled in float32 without a cache, against diffusers."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from parity import FAMILIES, PLAIN, PROMPTS, expected, relative_error, seeded

from prebake.exporter.pipeline import Options, export
from prebake.exporter.progress import progress
from prebake.exporter.recipe import resolve
from prebake.runtime import load

LIMIT = 1e-4
"""On latents, relative in L2: AOTInductor fuses, and adds in another order; over all steps."""


def compiled(shared_tmp: Path, name: str) -> Path:
    """The family's artifact, exported once per run, whatever the workers."""
    case, folder = FAMILIES[name], shared_tmp / "families" / name
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock, progress("quiet") as quiet:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            recipe = resolve(case.recipe, (*PLAIN, *case.overrides), f"tiny:{case.tiny}")
            export(recipe, folder, Options(verify=False), quiet)
    return folder


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.works(n, "compiled")) for n in FAMILIES])
def test_a_compiled_artifact_draws_what_diffusers_draws(name, shared_tmp, tmp_path):
    pipe = load(compiled(shared_tmp, name), cache_dir=tmp_path)
    latents = expected(name, PROMPTS[0], generator=seeded(1))
    drawn = [pipe(PROMPTS[0], seed=s, output_type="latent", **FAMILIES[name].ours)[0] for s in (1, 2)]
    assert relative_error(drawn[0], latents) < LIMIT
    assert relative_error(drawn[1], latents) > 0.1  # the canary: another noise
