import hashlib
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import toy
from prebake.runtime.machine import cpu_flags


@pytest.fixture(scope="session")
def eager():
    return toy.Eager()


@pytest.fixture(scope="session")
def toy_artifact(request, eager):
    """The compiled toy, read-only by agreement: copy it (`artifact_copy`) before you damage it.

    Compiling takes a minute, so it is kept in pytest's own cache until toy.py or torch changes.
    """
    recipe = Path(toy.__file__).read_bytes() + torch.__version__.encode() + "".join(sorted(cpu_flags())).encode()
    folder = request.config.cache.mkdir("prebake-toy") / hashlib.sha256(recipe).hexdigest()[:16]
    if not folder.exists():
        fresh = Path(tempfile.mkdtemp(dir=folder.parent))
        toy.build(fresh, eager)
        fresh.rename(folder)
    return folder


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
