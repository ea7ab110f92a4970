"""An artifact on paper, a place to pull it to, and a cache of the test's own."""

from __future__ import annotations

import pytest

from support.transfer_artifacts import (
    artifact_in,
)


@pytest.fixture
def private_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def artifact(tmp_path):
    return artifact_in(tmp_path / "artifact")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "there" / "pulled"  # whose parent is made
