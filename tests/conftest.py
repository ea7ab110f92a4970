"""Fixtures for all: one small random FLUX pipeline, and the artifact of it, exported once per run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random FLUX pipeline, 64 wide, as `save_pretrained` writes it."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_pipe(tiny_folder):
    """The same, loaded afresh in float32: tests may change it."""
    from prebake.exporter.source import load

    return load(str(tiny_folder), None, {"default": torch.float32}).pipe


@pytest.fixture(scope="session")
def tiny_artifact(tiny_folder, tmp_path_factory) -> Path:
    """`flux-fast` on the tiny pipeline, with attention reuse, 8 steps: compiled once."""
    from prebake.exporter.pipeline import Options, export
    from prebake.exporter.progress import progress
    from prebake.exporter.recipe import resolve

    recipe = resolve("flux-fast", TINY_OVERRIDES, str(tiny_folder))
    with progress("quiet") as quiet:
        return export(recipe, tmp_path_factory.mktemp("artifacts") / "tiny", Options(), quiet)


TINY_OVERRIDES = ("cache.method=pab", "sampler.steps=8", "verify.psnr_db=30", "verify.cached_psnr_db=20")
