"""The toy artifact of the runtime's tests."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "runtime"))


@pytest.fixture(scope="session")
def toy_artifact(request):
    from kept import kept_toy

    return kept_toy(request.config)


@pytest.fixture
def artifact_copy(toy_artifact, tmp_path):
    return shutil.copytree(toy_artifact, tmp_path / "artifact")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache", numbered=True)
