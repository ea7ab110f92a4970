"""Which disk an export names, where one is full: the one that is, not the output's whatever happens."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from prebake.exporter.package import disk
from prebake.runtime.errors import ExportError

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture
def places(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """TMPDIR and an output beside it."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary, tmp_path / "out" / "artifact"


def explain(output: Path, error: Exception) -> str:
    with pytest.raises(ExportError) as e, disk.explain_disk_errors(output):
        raise error
    return str(e.value)


def test_a_compiler_that_names_a_file_in_tmpdir(places):
    temporary, output = places
    outer = ExportError("graph 'full': AOTInductor could not compile it")
    outer.__cause__ = RuntimeError(f"C++ compile error\nError writing to {temporary}/ccX.s: {FULL}")
    said = explain(output, outer)
    assert f"since {temporary}/ccX.s says {FULL!r}" in said
    assert said.endswith("make room, or choose another TMPDIR")


def test_an_error_with_a_file_name(places):
    temporary, output = places
    said = explain(output, OSError(errno.ENOSPC, FULL, str(temporary / "x")))
    assert f"since {temporary}/x says" in said
    assert said.endswith("make room, or choose another TMPDIR")


@pytest.mark.parametrize("full", ["tmp", "out"])
def test_one_that_names_nothing_is_of_the_disk_with_less_room(places, monkeypatch, full):
    _, output = places
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0 if folder.name == full else 10**9)
    said = explain(output, RuntimeError("I/O error: No space left on device (os error 28)"))
    assert f"/{full} says {FULL!r}" in said
    assert ("--output" in said) == (full == "out")


def test_an_output_in_tmpdir_may_be_moved(places):
    temporary, _ = places
    output = temporary / "artifact"
    said = explain(output, OSError(errno.ENOSPC, FULL, str(temporary / ".artifact.x.partial" / "weights")))
    assert said.endswith("choose another --output or TMPDIR")
