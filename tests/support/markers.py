"""What a test needs, as markers: set here from the fixtures that it asks for and the folder that it lies in.

`compiles`: a compiler runs for it, of graphs, of kernels or of a wheel. `docs`: it holds pages, benchmarks or the HTML report, and no
code that draws pictures. `peers`: whole models run in eager beside diffusers or a cache's authors. `make quick` leaves the three out; a test that
compiles without saying so fails there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.paths import ROOT

COMPILING_FIXTURES = frozenset(
    {
        "tiny_artifact",
        "tiny_sd_artifact",
        "range_artifact",
        "toy_artifact",
        "wheel",
        "slim_python",
        "native_kernels",
        "compiled",
    }
)
DOCS_FOLDERS = tuple(
    ROOT / "tests" / folder for folder in ("docs", "benchmarks", "exporter/html_report", "requirements")
)
PEER_FOLDERS = tuple(
    ROOT / "tests" / folder
    for folder in (
        "exporter/caches",
        "exporter/calibrators",
        "exporter/families",
        "exporter/shapes",
        "exporter/tiny",
        "runtime/attachment",
    )
)
COMPILING_FOLDERS = tuple(
    ROOT / "tests" / folder for folder in ("end_to_end", "exporter/lower/aoti", "exporter/lower/tensorrt", "faults")
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before `-m` chooses."""
    for item in items:
        mark_needs(item)


def mark_needs(item: pytest.Item) -> None:
    """Adds the markers that follow from the item's fixtures and folder."""
    if COMPILING_FIXTURES & set(getattr(item, "fixturenames", ())) or lies_in(item.path, COMPILING_FOLDERS):
        item.add_marker("compiles")
    if lies_in(item.path, DOCS_FOLDERS):
        item.add_marker("docs")
    if lies_in(item.path, PEER_FOLDERS):
        item.add_marker("peers")


def lies_in(path: Path, folders: tuple[Path, ...]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


@pytest.fixture(autouse=True)
def no_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests that compile are left out, one that compiles all the same fails."""
    if "not compiles" not in request.config.getoption("-m", ""):
        return

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("it compiles: mark it with @pytest.mark.compiles")

    if lowering := sys.modules.get("prebake.exporter.lower.aoti"):
        monkeypatch.setattr(lowering, "compile_graph_module", refuse)
