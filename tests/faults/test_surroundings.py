"""Locales and clocks: what a load, a command and a note of what was hashed make of other ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prebake.runtime import ArtifactError
from prebake.runtime.artifact import open_artifact
from prebake.runtime.manifest import read_manifest
from prebake.runtime.problems import artifact_problems
from prebake.runtime.storage import hash_marker as verified

ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN = {"PYTHONIOENCODING": "latin-1"}
PROMPT = "a red 🦊 circle"
WEIGHTS = "weights/denoiser.safetensors"


@pytest.fixture(scope="module")
def renamed(toy_artifact, tmp_path_factory):
    """The compiled one in a folder whose name no ASCII has, and some of it no Latin-1."""
    link = tmp_path_factory.mktemp("names") / "künstlich 圆"
    link.symlink_to(toy_artifact, target_is_directory=True)
    return link


def command(*arguments: object, cwd: Path, **env: str) -> str:
    """What `python -m prebake.runtime` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "prebake.runtime", *map(str, arguments)],
        capture_output=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache"), **env},
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("utf-8", "backslashreplace")


def test_a_prompt_is_the_same_in_every_locale(renamed, tmp_path):
    for name, env in (("ü.png", ASCII), ("ö.png", {})):
        command("run", renamed, PROMPT, "--seed", 1, "--output", name, cwd=tmp_path, **env)
    assert (tmp_path / "ü.png").read_bytes() == (tmp_path / "ö.png").read_bytes()


@pytest.mark.parametrize("env", [ASCII, LATIN], ids=["ASCII", "Latin-1"])
def test_what_a_terminal_cannot_show_is_no_error(renamed, tmp_path, env):
    assert "toy" in command("inspect", renamed, cwd=tmp_path, **env)


def test_a_manifest_is_utf_8_in_every_locale(paper, tmp_path):
    manifest = json.loads((paper / "manifest.json").read_text("utf-8"))
    manifest["source"]["model"] = "圆"
    (paper / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")
    code = (
        "import sys; from pathlib import Path; from prebake.runtime.manifest import read_manifest;"
        "print(ascii(read_manifest(Path(sys.argv[1])).source.model))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, paper], capture_output=True, text=True, env={**os.environ, **ASCII}
    )
    assert done.stdout.strip() == "'\\u5706'", done.stderr


# --- clocks -----------------------------------------------------------------------------------------------------------

YEARS = 365 * 24 * 3600 * 10**9  # ns


@pytest.fixture
def loads(paper, monkeypatch, tmp_path):
    """Counts what is hashed in a load of the artifact on paper, when the clock says something else."""
    import prebake.runtime.backends.aoti
    from prebake.runtime.storage import files
    from support import paper_artifact as on_paper

    monkeypatch.setattr(prebake.runtime.backends.aoti, "open_model", lambda so, *_: on_paper.PaperModel(so))
    hashed, real, clock = [], files.sha256_of, time.time_ns
    monkeypatch.setattr(files, "sha256_of", lambda d: hashed.append(d) or real(d))

    def load(later: int) -> int:
        hashed.clear()
        monkeypatch.setattr(verified.time, "time_ns", lambda: clock() + later)
        assert open_artifact(paper, cache_dir=tmp_path / "cache").weights["denoiser.w"].tolist() == [1.0] * 3
        return len(hashed)

    return load


def test_a_clock_that_was_set_back_costs_a_hash_and_no_more(paper, loads):
    every = len(read_manifest(paper).files)
    assert loads(-20 * YEARS) == every  # the files seem to be of the future, so nothing is noted
    assert loads(-20 * YEARS) == every
    assert loads(YEARS) == every  # now it is noted
    assert loads(YEARS) == 0
    assert loads(-20 * YEARS) == 0  # a note holds or not by the files' times, whatever the clock says


@pytest.mark.parametrize("year", [1970, 2100])
def test_files_of_any_age_are_loaded(paper, loads, year):
    for path in paper.rglob("*"):
        os.utime(path, ((year - 1970) * 31_556_952,) * 2)
    assert loads(0) == len(read_manifest(paper).files)


# --- a system that does not give the files ---------------------------------------------------------------------------

REFUSALS = """
import sys
from prebake.runtime import ArtifactError
from prebake.runtime.artifact import open_artifact
from prebake.runtime.problems import artifact_problems
from pathlib import Path
for folder in map(Path, sys.argv[1:]):
    try:
        open_artifact(folder)
    except ArtifactError as e:
        print(e)
    print(*(problem for _, problem in artifact_problems(folder)), sep="\\n")
"""


def test_files_that_this_user_may_not_read(paper, tmp_path):
    """An administrator may read everything: without that ability, by `setpriv`, an owner is held to its own permissions."""
    first = {".": "manifest.json", "manifest.json": "manifest.json", "plans": "plans/2.json", WEIGHTS: WEIGHTS}
    folders = []
    for n, closed in enumerate(first):
        folders.append(shutil.copytree(paper, tmp_path / str(n)))
        (folders[-1] / closed).chmod(0)
    unprivileged = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    if unprivileged and not shutil.which("setpriv"):
        pytest.skip("needs `setpriv` of util-linux, or a user who is no administrator")
    done = subprocess.run(
        [*unprivileged, sys.executable, "-c", REFUSALS, *map(str, folders)], capture_output=True, text=True, check=False
    )
    for folder in folders:
        for path in (folder, *(folder / closed for closed in first)):
            path.chmod(0o755)  # so that pytest can remove it
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for folder, where in zip(folders, first.values(), strict=True):
        said = (
            f"{where}: this user may not read it (Permission denied); its owner can change that: chmod -R a+rX {folder}"
        )
        assert lines.pop(0) == f"{folder}: {said}"
        assert lines.pop(0).removeprefix(f"{folder}: ") == said
    assert lines == []


@pytest.mark.parametrize("path", [WEIGHTS, "graphs/denoiser.pt2"])
def test_a_disk_that_fails(paper, monkeypatch, path):
    real, failing = os.preadv, (paper / path).stat().st_ino

    def preadv(descriptor, *args):
        if os.fstat(descriptor).st_ino == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *args)

    monkeypatch.setattr(os, "preadv", preadv)
    said = f"{path}: cannot be read (Input/output error); if its disk is failing, restore the file on another one"
    with pytest.raises(ArtifactError) as caught:
        open_artifact(paper)
    assert str(caught.value) == f"{paper}: {said}"
    assert list(artifact_problems(paper)) == [("files", said)]
