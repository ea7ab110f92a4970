"""A process that replays an artifact needs what a plain install brings, and no more.

The environment is a real one: prebake's own wheel, unpacked, beside links to just those distributions that `pip install
prebake` without extras would bring. They are found by following the installed metadata, so nothing is downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDERS = ("exporter", "recipes", "runtime")
RUN = "import sys; from prebake.exporter.cli import main; sys.exit(main())"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """prebake's wheel, built from a copy of the tree whose weight files are empty."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=ignored, copy_function=copy_without_weights)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tree / "dist")], cwd=tree, check=True, capture_output=True)
    return next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def slim_python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds prebake and what it requires without extras."""
    home = tmp_path_factory.mktemp("slim")
    venv.create(home, with_pip=False)
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    for name in sorted(required("prebake") - {"prebake"}):
        for entry in top_level(name):
            (site / entry.name).symlink_to(entry)
    return home / "bin" / "python"


def ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__"}


def copy_without_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        Path(target).touch()
    else:
        shutil.copy(source, target)


def required(name: str, extra: str = "") -> set[str]:
    """The distribution and all that it requires here, canonical names, as pip would resolve them."""
    found: set[tuple[str, str]] = set()
    ahead = [(canonicalize_name(name), extra)]
    while ahead:
        entry = ahead.pop()
        if entry in found:
            continue
        try:
            requires = distribution(entry[0]).requires or []
        except PackageNotFoundError:  # allowed by an "extra" of somebody else, and not installed
            continue
        found.add(entry)
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": entry[1]}):
                ahead += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    return {name for name, _ in found}


def top_level(name: str) -> set[Path]:
    """The files and folders that a distribution put right into site-packages."""
    installed = distribution(name)
    root = Path(str(installed.locate_file("")))
    firsts = {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}
    return {root / first for first in firsts if (root / first).exists()}


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(cwd), "XDG_CACHE_HOME": str(cwd / "cache"), "PATH": "/nowhere"}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_a_plain_install_requires_no_model_library_and_no_compiler():
    assert required("prebake") >= {"torch", "numpy", "safetensors", "tokenizers", "pillow", "pydantic"}
    assert required("prebake") & {"diffusers", "transformers", "torchao", "accelerate", "rich", "scikit-image"} == set()
    assert required("prebake", "export") >= {"diffusers", "transformers", "torchao"}


def test_the_wheel_has_every_file_of_the_three_folders(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("needs git and a clone, to know which files belong to the project")
    assert [file for file in tracked.stdout.split() if f"prebake/{file}" not in packed] == []


@pytest.mark.parametrize("module", ["diffusers", "transformers", "torchao", "accelerate"])
def test_the_slim_environment_cannot_import(module, slim_python, tmp_path):
    done = run(slim_python, "-c", f"import {module}", cwd=tmp_path)
    assert f"No module named '{module}'" in done.stderr


@pytest.mark.parametrize("how", [["-c", RUN], ["-m", "prebake.exporter"], ["-m", "prebake.runtime"]])
def test_run_draws_a_picture_in_the_slim_environment(how, slim_python, tiny_artifact, tmp_path):
    done = run(slim_python, *how, "run", str(tiny_artifact), "a red circle", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "image.png").size == (32, 32)


def test_run_guides_a_unet_in_the_slim_environment(slim_python, tiny_sd_artifact, tmp_path):
    done = run(slim_python, "-c", RUN, "run", str(tiny_sd_artifact), "a red circle", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "image.png").size == (32, 32)


def test_inspect_works_in_the_slim_environment(slim_python, tiny_artifact, tmp_path):
    done = run(slim_python, "-c", RUN, "inspect", str(tiny_artifact), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FluxPipeline" in done.stdout


def test_export_in_the_slim_environment_names_the_extra(slim_python, tmp_path):
    done = run(slim_python, "-c", RUN, "export", "--recipe", "baseline", "--model", "shapes", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("prebake: error: `prebake export` needs ")
    assert done.stderr.endswith(": pip install 'prebake[export]'\n")
    assert list(tmp_path.glob("artifacts/*")) == []
