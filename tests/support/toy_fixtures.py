import shutil

import pytest

from support import toy_model as toy
from support.toy_cache import kept_toy


@pytest.fixture(scope="session")
def eager():
    return toy.Eager()


@pytest.fixture(scope="session")
def toy_artifact(request):
    """The compiled toy, read-only by agreement: copy it (`artifact_copy`) before you damage it."""
    return kept_toy(request.config)


@pytest.fixture
def artifact_copy(toy_artifact, tmp_path):
    return shutil.copytree(toy_artifact, tmp_path / "artifact")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Where machine code is unpacked in tests, in place of the user's cache."""
    return tmp_path_factory.mktemp("cache", numbered=True)


@pytest.fixture(scope="session")
def pipe(toy_artifact, cache_dir):
    from prebake.runtime import load

    return load(toy_artifact, cache_dir=cache_dir)
