"""The layout that `ls` shows: a story that is short, few files beside it, and imports that point one way."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from support.import_graph import find_circle, group_by_folder, list_imports

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Each file of the two sides, and those that it imports."""
    return list_imports(ROOT, "exporter", "runtime")


def test_the_story_is_short():
    assert len((ROOT / "exporter" / "pipeline.py").read_text("utf-8").splitlines()) <= 130


@pytest.mark.parametrize(("folder", "most"), [("exporter", 10), ("runtime", 25)])
def test_few_files_lie_flat(folder, most):
    flat = sorted(p.name for p in (ROOT / folder).glob("*.py"))
    assert len(flat) <= most, flat


def test_no_circle_between_files(imports):
    assert not find_circle(imports)


def test_no_circle_between_folders(imports):
    assert not find_circle(group_by_folder(imports))


def test_a_circle_is_found(tmp_path):
    """The canary of both: one file, one inside a function and one for types, of which the last is none."""
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    files = {
        "a/__init__.py": "",
        "a/inner/__init__.py": "",
        "a/inner/one.py": "def f():\n    from ...b import two\n",
        "b/__init__.py": "",
        "b/two.py": "from ..a.inner import one\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    graph = list_imports(tmp_path, "a", "b")
    assert set(find_circle(graph)) == {"a/inner/one.py", "b/two.py"}
    assert set(find_circle(group_by_folder(graph))) == {"a/inner", "b/two.py"}
    (tmp_path / "b" / "two.py").write_text("if TYPE_CHECKING:\n    from ..a.inner import one\n")
    graph = list_imports(tmp_path, "a", "b")
    assert not find_circle(graph)
    assert graph["a/inner/one.py"] == {"b/two.py"}


def test_the_runtimes_command_line_is_no_library(imports):
    """`prebake` has the commands of both; nothing else in the exporter imports those of the runtime."""
    exporter = [file for file in imports if file.startswith("exporter/") and not file.startswith("exporter/cli/")]
    assert "exporter/pipeline.py" in exporter
    assert not [(file, used) for file in exporter for used in imports[file] if used.startswith("runtime/cli/")]


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    there = {
        "prebake." + p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in ("exporter", "runtime", "recipes")
        for p in (ROOT / folder).rglob("__init__.py")
    }
    assert there == {
        name for name in listed if name.startswith(("prebake.exporter", "prebake.runtime", "prebake.recipes"))
    }
