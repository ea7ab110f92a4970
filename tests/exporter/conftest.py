"""The tiny artifact in a folder of the test's own, and a user cache beside it."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def copied(tiny_artifact, tmp_path):
    """The artifact (8 steps, attention reuse) in a folder that a test may change."""
    return shutil.copytree(tiny_artifact, tmp_path / "copied")


@pytest.fixture
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "replan-cache"))
