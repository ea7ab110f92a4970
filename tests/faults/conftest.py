"""The artifacts of `tests/format` (on paper) and `tests/runtime` (compiled) are damaged here too."""

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("format", "runtime")]

import paper as paper_artifact
from kept import kept_toy


@pytest.fixture
def paper(tmp_path):
    """A good artifact whose machine code is none."""
    return paper_artifact.build(tmp_path / "artifact")


@pytest.fixture(scope="session")
def toy_artifact(request):
    """A compiled one, read-only by agreement."""
    return kept_toy(request.config)
