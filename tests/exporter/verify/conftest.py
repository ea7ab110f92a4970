"""The tiny artifact, opened to draw."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def replayer(tiny_artifact):
    from prebake.exporter.verify.replayer import Replayer
    from prebake.runtime.artifact import open_artifact

    return Replayer(open_artifact(tiny_artifact))
