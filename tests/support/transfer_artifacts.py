"""What the tests of `push` and `pull` share: artifacts on paper, what a folder holds, and a bar that notes what moves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prebake.runtime.transfer.folder import FolderOrigin
from prebake.runtime.transfer.progress import TransferProgress
from prebake.runtime.transfer.pull import PullOptions, pull
from support import paper_artifact as paper

WEIGHTS = "weights/denoiser.safetensors"
PACKAGE = "graphs/denoiser.pt2"
PLAN = "plans/2.json"
REPORT = "reports/log.txt"
FILES = [PACKAGE, PLAN, WEIGHTS]  # in the manifest's order, which is that of copying


def artifact_in(folder: Path) -> Path:
    """An artifact on paper, with a report."""
    paper.build(folder)
    (folder / REPORT).write_text("it went well")
    return folder


def another(artifact: Path, folder: Path) -> Path:
    """One like it, without the report, whose plan is another; its code and weights are the same."""
    shutil.copytree(artifact, folder, ignore=shutil.ignore_patterns("reports"))
    (folder / PLAN).write_text(paper.PLAN.model_dump_json(indent=1))
    paper.relist(folder)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    """Every file's path and content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Noting(TransferProgress):
    """Notes files and notes; `stops_at` is a file at which somebody presses Ctrl-C."""

    def __init__(self, stops_at: str = ""):
        self.files: list[str] = []
        self.notes: list[str] = []
        self.stops_at = stops_at

    def file(self, path, size):
        if path == self.stops_at:
            raise KeyboardInterrupt
        self.files.append(path)

    def note(self, text):
        self.notes.append(text)


class Flipping(FolderOrigin):
    """A place that gives one file with a wrong byte."""

    def __init__(self, folder: Path, path: str):
        super().__init__(folder)
        self.path = path

    def fetch(self, files, into, bar):
        super().fetch(files, into, bar)
        if self.path in files:
            flip(into / self.path)


def pulled(origin, target, bar=None, **choices):
    return pull(origin, target, PullOptions(**choices), bar or TransferProgress())


def refused(kind, function, *args, **kwargs) -> list[str]:
    with pytest.raises(kind) as e:
        function(*args, **kwargs)
    return str(e.value).splitlines()
