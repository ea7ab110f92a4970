"""The lock is one of pyproject.toml's ranges, plain to read, and what `make` installs with."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
LINES = [line for line in (ROOT / "requirements/lock.txt").read_text("utf-8").splitlines() if line[0] != "#"]
LOCKED = dict(line.split("==") for line in LINES)


@pytest.fixture
def lock() -> ModuleType:
    """`requirements/lock.py`, which is a script."""
    spec = importlib.util.spec_from_file_location("lock", ROOT / "requirements/lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def required(lock: ModuleType) -> dict[str, Requirement]:
    return {canonicalize_name(each.name): each for each in map(Requirement, lock.requirements("dev"))}


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_line_is_a_name_and_a_version():
    """No URL, no hash, no option, and no version of somebody's own build."""
    assert [line for line in LINES if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[a-z0-9.]+", line)] == []
    assert sorted(LOCKED) == [line.split("==")[0] for line in LINES]


def test_torch_and_what_only_some_of_its_builds_need_are_not_locked():
    assert [name for name in LOCKED if re.match(r"torch$|triton|nvidia-|cuda-", name)] == []


def test_the_lock_has_all_that_is_required_in_a_version_that_is_allowed(lock):
    wanted = required(lock)
    torch = wanted.pop("torch")
    assert len(wanted) > 25
    assert [name for name in wanted if name not in LOCKED] == []
    assert [str(each) for name, each in wanted.items() if not each.specifier.contains(LOCKED[name])] == []
    (version,) = re.findall(r"^TORCH +\?= (.*)", MAKEFILE, re.MULTILINE)
    assert torch.specifier.contains(version)


def test_the_lock_is_for_every_python_of_the_workflow(lock):
    workflow = (ROOT / ".github/workflows/tests.yml").read_text("utf-8")
    pythons = set(re.findall(r'"(3\.\d+)"', workflow))
    assert pythons
    assert pythons <= set(lock.PYTHONS)
    assert PROJECT["requires-python"] == f">={lock.PYTHONS[0]}"


def test_the_tools_are_locked(lock):
    assert set(lock.TOOLS) <= LOCKED.keys()


# --- pyproject.toml ---------------------------------------------------------------------------------------------------

EXTRAS = {extra: lines for extra, lines in PROJECT["optional-dependencies"].items() if extra != "dev"}
ANY = {"setuptools"}
"""What is used by torch alone, which says which."""


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])
def test_a_range_begins_and_ends(line):
    requirement = Requirement(line)
    if requirement.name not in ANY:
        assert {"<", ">="} == {each.operator for each in requirement.specifier}


# --- the Makefile -----------------------------------------------------------------------------------------------------


def made(tmp_path: Path, *words: str, **environment: str) -> list[str]:
    """The `pip install` lines of `make`, which are printed and not run."""
    command = ["make", "-n", f"VENV={tmp_path}/venv", *words, "install"]
    shown = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout
    return [line for line in shown.splitlines() if " install --quiet " in line]


def test_all_that_make_installs_is_under_the_lock(tmp_path):
    commands = made(tmp_path)
    assert len(commands) == 3
    assert all("--constraint requirements/lock.txt" in line for line in commands)
    assert "--no-build-isolation" in commands[-1]  # with it pip would fetch a setuptools that no lock binds


def test_another_torch_is_a_word_for_make(tmp_path):
    first, *_ = made(tmp_path, "TORCH=2.14.1")
    assert first.endswith("'torch==2.14.1'")


@pytest.mark.parametrize("by_environment", [False, True])
def test_without_lock_and_torch_the_ranges_alone_decide(tmp_path, by_environment):
    commands = made(tmp_path, LOCK="", TORCH="") if by_environment else made(tmp_path, "LOCK=", "TORCH=")
    assert [line for line in commands if "--constraint" in line] == []
    assert [line for line in commands if "torch==" in line and "test -z ''" not in line] == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "requirements/lock.txt"])
def test_what_is_installed_is_installed_again_when_they_change(tmp_path, changed):
    (tmp_path / "venv").mkdir()
    installed = tmp_path / "venv/installed"
    installed.touch()
    assert made(tmp_path) == []
    assert len(made(tmp_path, "-W", changed)) == 3


# --- the script -------------------------------------------------------------------------------------------------------


def test_extras_of_its_own_are_followed(lock):
    names = {Requirement(line).name for line in lock.requirements("dev")}
    assert names >= {"torch", "diffusers", "onnxruntime", "pytest"}
    assert "prebake" not in names
    assert set(lock.requirements("ort")) == {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["ort"]}


def test_later_pythons_are_held_to_what_the_first_took(lock, monkeypatch, tmp_path):
    asked = []

    def resolved(wanted, held, *options):
        asked.append((wanted, dict(held), options))
        found = (
            {"b": ("2", "b.whl"), "a-c": ("1", "a.tar.gz")} if not held else {"b": ("2", "b.whl"), "d": ("3", "d.whl")}
        )
        return {
            name: {"metadata": {"version": version}, "download_info": {"url": f"file:///{file}"}}
            for name, (version, file) in found.items()
        }

    monkeypatch.setattr(lock, "resolved", resolved)
    monkeypatch.setattr(lock, "requirements", lambda extra: ["b<3", "A_c>=1"])
    monkeypatch.setattr(lock, "LOCK", tmp_path / "lock.txt")
    monkeypatch.setattr(lock, "OLDEST", sys.version_info[:2])
    lock.main("2.13.0")
    assert (tmp_path / "lock.txt").read_text("utf-8") == f"{lock.HEAD}a-c==1\nb==2\nd==3\n"
    assert asked[0] == (["pip", "setuptools", "torch==2.13.0", "b<3", "A_c>=1"], {}, ())
    for (wanted, held, options), python in zip(asked[1:], lock.PYTHONS[1:], strict=True):
        assert wanted == ["pip", "setuptools", "torch==2.13.0", "b<3"]  # what has no wheel, pip asks of no other Python
        assert held.items() >= {"a-c": "1", "b": "2"}.items()
        assert options[:2] == ("--python-version", python)


def test_another_python_is_refused(lock, monkeypatch):
    monkeypatch.setattr(lock, "OLDEST", (3, 10))
    with pytest.raises(SystemExit, match=r"make lock PYTHON=python3\.11"):
        lock.main("2.13.0")


@pytest.mark.parametrize(
    ("name", "of_a_build"),
    [("torch", True), ("triton", True), ("nvidia-cudnn-cu13", True), ("cuda-toolkit", True), ("torchao", False)],
)
def test_what_is_left_out(lock, name, of_a_build):
    assert bool(lock.OF_A_BUILD.fullmatch(name)) is of_a_build


def test_a_version_that_is_not_allowed_would_be_noticed(lock):
    """The canary of the comparison above."""
    assert not required(lock)["onnxruntime"].specifier.contains(Version("1.33.0"))
