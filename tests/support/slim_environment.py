"""An environment as a plain `pip install prebake` makes it: its wheel, unpacked, beside links to just those distributions
that it requires without extras. They are found by following the installed metadata, so nothing is downloaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.paths import ROOT

FOLDERS = ("api", "exporter", "recipes", "runtime")


def build_wheel(tree: Path) -> Path:
    """prebake's wheel, built from a copy of the sources in the empty folder `tree`, whose weight files are empty."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=ignored, copy_function=copy_without_weights)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tree / "dist")], cwd=tree, check=True, capture_output=True)
    return next((tree / "dist").glob("*.whl"))


def environment(home: Path, wheel: Path) -> Path:
    """The interpreter of an environment in `home` that holds the wheel and what it requires without extras."""
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
    """`python *arguments` in the folder `cwd`, with nothing of this process's environment."""
    variables = {"HOME": str(cwd), "XDG_CACHE_HOME": str(cwd / "cache"), "PATH": "/nowhere"}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )
