"""Artifacts that pages are made of: one on paper, and a compiled one with its page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prebake.exporter.cli import main as cli
from prebake.exporter.html_report.facts import PageFacts, gather_facts
from prebake.exporter.progress import Progress
from support import paper_artifact as paper
from support.paper_report import NO_TIMES


@pytest.fixture
def folder(tmp_path) -> Path:
    return paper.build(tmp_path / "artifact")


@pytest.fixture
def bare(folder) -> PageFacts:
    """Of an artifact that was never verified, without times."""
    return gather_facts(folder, NO_TIMES, Progress())


@pytest.fixture(scope="session")
def compiled(tiny_artifact, tmp_path_factory) -> Path:
    """A copy of the tiny artifact: the page goes into its reports/."""
    return Path(shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("report") / "tiny"))


@pytest.fixture(scope="session")
def page(compiled) -> Path:
    assert cli.main(["report", str(compiled), "--runs", "2", "--quiet"]) == 0
    return compiled / "reports/report.html"
