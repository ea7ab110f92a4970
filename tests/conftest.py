"""Fixtures for all: a small random FLUX pipeline, one of Stable Diffusion, and their artifacts, exported once per run."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch

from support.paths import ROOT
from support.works_table import pytest_addoption, pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401  (hooks)

pytest_plugins = ("support.markers", "support.paper_fixtures", "support.toy_fixtures")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The wrapper calls a graph's kernels and computes nothing: unoptimized it compiles in three quarters of the time.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """What outlives its test lies in one folder, which goes with the run: torch.compile's headers, 140 MB for each set of flags, and
    the pipelines on paper of `families/`."""
    if not hasattr(config, "workerinput"):
        os.environ["PYTEST_TMP"] = folder = tempfile.mkdtemp(prefix="prebake-tests-")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU that this torch can use")


@pytest.fixture(scope="session")
def tiny_folder(shared_tmp) -> Path:
    """A random FLUX pipeline, 64 wide, as `save_pretrained` writes it."""
    from support.tiny_pipelines import save_tiny

    folder = shared_tmp / "tiny" / "model"
    with (shared_tmp / "tiny-model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "prebake.toml").exists():  # written last
            save_tiny(folder)
    return folder


@pytest.fixture
def tiny_pipe(tiny_folder):
    """The same, loaded afresh in float32: tests may change it."""
    from prebake.exporter.load.source import load_model

    return load_model(str(tiny_folder), None, {"default": torch.float32}).pipe


@pytest.fixture(scope="session")
def tiny_artifact(tiny_folder, shared_tmp) -> Path:
    """`flux-fast` on the tiny pipeline, with attention reuse, 8 steps."""
    from support.tiny_pipelines import OVERRIDES

    return exported(shared_tmp, "tiny", "flux-fast", OVERRIDES, tiny_folder)


@pytest.fixture(scope="session")
def range_artifact(tiny_folder, shared_tmp) -> Path:
    """`flux-fast` on it in float32, uncached, 4 steps, for 5 x 5 sizes."""
    from support.tiny_pipelines import RANGE_OVERRIDES

    return exported(shared_tmp, "range", "flux-fast", RANGE_OVERRIDES, tiny_folder)


@pytest.fixture(scope="session")
def tiny_sd_folder(shared_tmp) -> Path:
    """A random Stable Diffusion pipeline, as `save_pretrained` writes it."""
    from support.tiny_pipelines import save_tiny_sd

    folder = shared_tmp / "tiny-sd" / "model"
    with (shared_tmp / "tiny-sd-model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "prebake.toml").exists():  # written last
            save_tiny_sd(folder)
    return folder


@pytest.fixture
def tiny_sd_pipe(tiny_sd_folder):
    """The same, loaded afresh in float32: tests may change it."""
    from prebake.exporter.load.source import load_model

    pipe = load_model(str(tiny_sd_folder), None, {"default": torch.float32}).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_sd_artifact(tiny_sd_folder, shared_tmp) -> Path:
    """`sd-fast` on it in float32, uncached, 4 steps."""
    from support.tiny_pipelines import SD_OVERRIDES

    return exported(shared_tmp, "tiny-sd", "sd-fast", SD_OVERRIDES, tiny_sd_folder)


def exported(shared_tmp: Path, name: str, recipe: str, overrides: tuple[str, ...], model: Path) -> Path:
    """An artifact, compiled once per run, whatever the workers."""
    from prebake.exporter.pipeline import ExportOptions, export
    from prebake.exporter.progress import open_progress
    from prebake.exporter.recipe.resolve import resolve

    folder = shared_tmp / "artifacts" / name
    with (shared_tmp / f"{name}-artifact.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with open_progress("quiet") as quiet:
                export(resolve(recipe, overrides, str(model)), folder, ExportOptions(), quiet)
    return folder


@pytest.fixture
def declared_extras(monkeypatch) -> None:
    """The requirements of `pyproject.toml`: an installation may be older than this tree."""
    from prebake.runtime import extras

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"].items()
    lines = [f'{line}; extra == "{extra}"' for extra, requirements in optional for line in requirements]
    monkeypatch.setattr(extras, "requires", lambda name: [*project["dependencies"], *lines])


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """prebake's wheel."""
    from support.slim_environment import build_wheel

    return build_wheel(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def slim_python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds prebake and what it requires without extras."""
    from support.slim_environment import environment

    return environment(tmp_path_factory.mktemp("slim"), wheel)


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory, request) -> Path:
    """The run's temporary folder; under xdist the one above the workers' own."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base
