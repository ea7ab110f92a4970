"""`push` and `pull` between folders: whole and compared or not at all, and on from where it was interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prebake.exporter.cli.main import main
from prebake.runtime.__main__ import main as slim_main
from prebake.runtime.check.artifact import check_artifact
from prebake.runtime.errors import ArtifactError, RecipeError
from prebake.runtime.manifest import read_manifest
from prebake.runtime.transfer.folder import FolderOrigin
from prebake.runtime.transfer.progress import TransferProgress
from prebake.runtime.transfer.push import push
from support.transfer_artifacts import (
    FILES,
    PACKAGE,
    PLAN,
    REPORT,
    WEIGHTS,
    Flipping,
    Noting,
    another,
    artifact_in,
    flip,
    held,
    pulled,
    refused,
)

pytestmark = pytest.mark.usefixtures("private_cache")


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_what_was_pushed_is_the_artifact_and_nothing_else_is_left(artifact, target):
    push(artifact, str(target), force=False, bar=TransferProgress())
    assert held(target) == held(artifact)
    assert listing(target.parent) == ["pulled"]
    assert target.stat().st_mode & 0o777 == 0o755
    check_artifact(target, read_manifest(target))


@pytest.mark.parametrize("place", ["{}", "file://{}", "file://localhost{}"])
def test_what_was_pulled_is_the_artifact(artifact, target, place, capsys):
    assert main(["pull", place.format(artifact), str(target), "--json"]) == 0
    assert held(target) == held(artifact)
    told = json.loads(capsys.readouterr().out)
    size = sum(entry.size for entry in read_manifest(artifact).files)
    assert told == {
        "place": str(target),
        "revision": None,
        "files": 3,
        "size": size,
        "fetched": 4,
        "fetched_bytes": size + len("it went well"),
    }


def test_a_path_with_spaces_as_a_url(tmp_path, target):
    artifact = artifact_in(tmp_path / "an artifact")
    assert main(["pull", artifact.as_uri(), str(target), "--quiet"]) == 0
    assert held(target) == held(artifact)


def test_a_pull_that_follows_is_not_hashed_again_by_load(artifact, target, monkeypatch):
    """The note of what was found right is bound to inodes, which the rename leaves as they are."""
    from prebake.runtime.check import artifact as checks
    from prebake.runtime.storage import hash_marker as verified

    monkeypatch.setattr(verified, "RECENT_NS", -(10**12))  # files this young are never noted otherwise
    pulled(FolderOrigin(artifact), target)
    monkeypatch.setattr(checks, "file_hashes", lambda files: pytest.fail("hashed again"))
    check_artifact(target, read_manifest(target))


def test_the_runtime_alone_has_both_commands(artifact, tmp_path, capsys):
    assert slim_main(["push", str(artifact), str(tmp_path / "a")]) == 0
    assert slim_main(["pull", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert held(tmp_path / "b") == held(artifact)
    said = capsys.readouterr()
    assert said.out.splitlines()[1].endswith(" files, 2.02kB, all as the manifest says")
    assert f"copy: {WEIGHTS} (" in said.err
    assert "\x1b" not in said.err + said.out


def test_no_library_of_the_hub_is_imported_for_folders(artifact, target):
    code = "import sys; from prebake.runtime.__main__ import main; main(sys.argv[1:]); print('huggingface_hub' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "pull", str(artifact), str(target), "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


# --- interrupted, and damaged on the way ------------------------------------------------------------------------------


def test_what_was_interrupted_goes_on(artifact, target):
    with pytest.raises(KeyboardInterrupt):
        pulled(FolderOrigin(artifact), target, Noting(stops_at=WEIGHTS))
    assert listing(target.parent) == [".pulled.pull"]
    rest = Noting()
    moved = pulled(FolderOrigin(artifact), target, rest)
    assert rest.files == [WEIGHTS, REPORT]
    assert moved.fetched == 2
    assert held(target) == held(artifact)
    assert listing(target.parent) == ["pulled"]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [(main, "prebake: interrupted; what has arrived is not fetched again\n"), (slim_main, "interrupted\n")],
)
def test_ctrl_c_is_told_in_a_line(artifact, target, monkeypatch, capsys, command, sentence):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderOrigin, "fetch", interrupt)
    assert command(["pull", str(artifact), str(target), "--quiet"]) == 130
    assert capsys.readouterr().err == sentence


def test_killed_while_a_file_was_half_written(artifact, target):
    stage = target.with_name(".pulled.pull")
    (stage / "graphs").mkdir(parents=True, mode=0o700)
    (stage / "plans").mkdir()
    (stage / PACKAGE).write_bytes((artifact / PACKAGE).read_bytes())
    (stage / PLAN).write_bytes((artifact / PLAN).read_bytes()[:-1])
    (stage / "stale" / "folder").mkdir(parents=True)
    (stage / "stale" / "folder" / "file").write_text("of another artifact")
    stage.chmod(0o700)
    noted = Noting()
    pulled(FolderOrigin(artifact), target, noted)
    assert noted.files == [PLAN, WEIGHTS, REPORT]
    assert held(target) == held(artifact)
    assert not (target / "stale").exists()


def test_links_in_what_was_left_are_not_written_through(artifact, target, tmp_path):
    stage, elsewhere = target.with_name(".pulled.pull"), tmp_path / "elsewhere"
    stage.mkdir(parents=True, mode=0o700)
    shutil.copytree(artifact / "weights", elsewhere)
    (stage / "weights").symlink_to(elsewhere)
    (stage / "plans").symlink_to(elsewhere)
    pulled(FolderOrigin(artifact), target)
    assert held(target) == held(artifact)
    assert not (target / "weights").is_symlink()
    assert listing(elsewhere) == ["denoiser.safetensors"]


@pytest.mark.parametrize("path", FILES)
def test_a_byte_that_changes_on_the_way(artifact, target, path):
    lines = refused(ArtifactError, pulled, Flipping(artifact, path), target)
    assert len(lines) == 2
    assert lines[0].startswith(f"{artifact}: {path}: sha256 is ")
    assert lines[1] == f"{artifact}: {target} is as it was; pull again, and only what is wrong is fetched"
    assert not target.exists()
    rest = Noting()
    pulled(FolderOrigin(artifact), target, rest)
    assert rest.files == [path, REPORT]  # reports have no hash, so they are fetched again
    assert held(target) == held(artifact)


def test_a_damaged_artifact_is_not_pulled(artifact, target):
    flip(artifact / WEIGHTS)
    assert refused(ArtifactError, pulled, FolderOrigin(artifact), target)[0].startswith(f"{artifact}: {WEIGHTS}: ")
    (artifact / WEIGHTS).unlink()
    assert (
        f"{WEIGHTS} cannot be opened as a plain file"
        in refused(ArtifactError, pulled, FolderOrigin(artifact), target)[0]
    )
    assert not target.exists()


def test_no_room(artifact, target, monkeypatch):
    few = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr("prebake.runtime.transfer.pull.shutil.disk_usage", lambda path: few)
    (line,) = refused(ArtifactError, pulled, FolderOrigin(artifact), target)
    assert line == f"{artifact}: has 2035 bytes to fetch, 10 are free here; make room"


def test_a_disk_that_fills_up_meanwhile(artifact, target):
    class Full(FolderOrigin):
        def fetch(self, files, into, bar):
            if WEIGHTS in files:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().fetch(files, into, bar)

    (line,) = refused(ArtifactError, pulled, Full(artifact), target)
    assert line == f"{target}: cannot be written (No space left on device); make room, or choose another"
    assert not target.exists()


# --- what is there already --------------------------------------------------------------------------------------------


def test_the_same_artifact_is_compared_and_not_copied(artifact, target):
    pulled(FolderOrigin(artifact), target)
    before = target.stat().st_ino
    assert pulled(FolderOrigin(artifact), target).fetched == 0
    assert push(artifact, str(target), force=False, bar=TransferProgress()).fetched == 0
    assert target.stat().st_ino == before
    flip(target / WEIGHTS)
    lines = refused(ArtifactError, pulled, FolderOrigin(artifact), target)
    assert lines[0].startswith(f"{target}: {WEIGHTS}: sha256 is ")
    assert lines[1] == f"{target}: fetch it again with --force"
    noted = Noting()
    pulled(FolderOrigin(artifact), target, noted, force=True)
    assert noted.files == [WEIGHTS, REPORT]
    assert held(target) == held(artifact)


def test_another_artifact_takes_force_and_shares_what_is_the_same(artifact, target, tmp_path):
    pulled(FolderOrigin(artifact), target)
    newer = another(artifact, tmp_path / "newer")
    (line,) = refused(RecipeError, pulled, FolderOrigin(newer), target)
    assert line == f"{target}: already exists, and is not that artifact; replace it with --force"
    assert held(target) == held(artifact)
    weights, noted = (target / WEIGHTS).stat().st_ino, Noting()
    pulled(FolderOrigin(newer), target, noted, force=True)
    assert noted.files == [PLAN]
    assert held(target) == held(newer)
    assert (target / WEIGHTS).stat().st_ino == weights
    assert listing(target.parent) == ["pulled"]


def test_a_refused_replacement_leaves_the_one_before(artifact, target, tmp_path):
    pulled(FolderOrigin(artifact), target)
    refused(ArtifactError, pulled, Flipping(another(artifact, tmp_path / "newer"), PLAN), target, force=True)
    assert held(target) == held(artifact)


def test_force_replaces_artifacts_only(artifact, target):
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years of work")
    (line,) = refused(RecipeError, pulled, FolderOrigin(artifact), target, force=True)
    assert line.startswith(f"{target}: --force replaces artifacts only, and this has no manifest.json of one")
    assert held(target) == {"thesis.tex": b"years of work"}


def test_force_does_not_take_other_files_with_it(artifact, target, tmp_path):
    pulled(FolderOrigin(artifact), target)
    (target / "thesis.tex").write_text("years of work")
    (line,) = refused(RecipeError, pulled, FolderOrigin(another(artifact, tmp_path / "newer")), target, force=True)
    assert "'thesis.tex' in it is no file of one" in line
    assert (target / "thesis.tex").read_text() == "years of work"


def test_what_was_private_stays_so(artifact, target, tmp_path):
    pulled(FolderOrigin(artifact), target)
    target.chmod(0o700)
    pulled(FolderOrigin(another(artifact, tmp_path / "newer")), target, force=True)
    assert target.stat().st_mode & 0o777 == 0o700
    assert (target / WEIGHTS).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("path", [WEIGHTS, "manifest.json", "signature.json"])
def test_no_more_is_written_than_was_said(artifact, target, path, monkeypatch):
    """3 GB, where the manifest says 3 MB, are refused by their size, and none of them is copied."""
    with (artifact / path).open("ab") as file:
        file.truncate(3 << 30)
    (line, *_) = refused(ArtifactError, pulled, FolderOrigin(artifact), target)
    assert f"{path} has 3221225472 bytes" in line
    assert sum(p.stat().st_size for p in target.parent.rglob("*")) < 1 << 20 if target.parent.exists() else True


def test_a_file_that_grows_while_it_is_copied_is_cut_off(artifact, target):
    class Growing(Noting):
        def advance(self, count):
            if self.files[-1] == WEIGHTS and (artifact / WEIGHTS).stat().st_size < 1 << 22:
                with (artifact / WEIGHTS).open("ab") as file:
                    file.truncate(1 << 22)

    size = (artifact / WEIGHTS).stat().st_size
    pulled(FolderOrigin(artifact), target, Growing())
    assert (target / WEIGHTS).stat().st_size == size


def test_a_target_whose_manifest_is_a_pipe_is_not_waited_for(artifact, target):
    target.mkdir(parents=True)
    os.mkfifo(target / "manifest.json")
    refused(RecipeError, pulled, FolderOrigin(artifact), target, force=True)


def test_two_at_once(artifact, target):
    stage = target.with_name(".pulled.pull")
    stage.mkdir(parents=True, mode=0o700)
    holder = os.open(stage, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        (line,) = refused(ArtifactError, pulled, FolderOrigin(artifact), target)
    finally:
        os.close(holder)
    assert line == f"{target}: another process is fetching it; wait for that one"
    pulled(FolderOrigin(artifact), target)
    assert held(target) == held(artifact)


def test_a_stage_that_others_can_write_to(artifact, target):
    stage = target.with_name(".pulled.pull")
    stage.mkdir(parents=True)
    stage.chmod(0o777)
    (line,) = refused(ArtifactError, pulled, FolderOrigin(artifact), target)
    assert line == f"{target}: cannot be written ({stage} is no folder of this user alone); choose another folder"
    stage.rmdir()
    stage.symlink_to(target.parent)
    assert "is no folder of this user alone" in refused(ArtifactError, pulled, FolderOrigin(artifact), target)[0]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("s3://bucket/x", "s3://bucket/x: expected a folder, file:///folder, or hf://owner/name@revision"),
        ("file://elsewhere/x", "file://elsewhere/x: expected a folder, file:///folder, or hf://owner/name@revision"),
        (".", ".: is the artifact itself; give another folder"),
    ],
)
def test_a_place_that_is_none(artifact, monkeypatch, capsys, place, sentence):
    monkeypatch.chdir(artifact)
    assert main(["push", ".", place, "--quiet"]) == 2
    assert capsys.readouterr().err == f"prebake: error: {sentence}\n"


def test_the_exit_code_of_what_is_refused(tmp_path, capsys):
    assert main(["pull", str(tmp_path / "absent"), str(tmp_path / "x"), "--quiet"]) == 5
    assert main(["push", str(tmp_path / "absent"), str(tmp_path / "x"), "--quiet"]) == 5
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"prebake: error: {tmp_path / 'absent'}: expected an artifact folder, found nothing"


# --- what is said -----------------------------------------------------------------------------------------------------


def test_json_has_one_object_a_line(artifact, target, capsys):
    assert main(["pull", str(artifact), str(target), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [e["stage"] for e in events if e["event"] == "begin"] == ["compare", "copy", "verify"]
    assert [e["what"].split()[0] for e in events if e["event"] == "file"] == [*FILES, REPORT]


def test_a_terminal_gets_a_bar(artifact, target, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["pull", str(artifact), str(target)]) == 0
    assert "\x1b" in capsys.readouterr().err


def test_a_terminal_without_rich_gets_lines(artifact, target, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["pull", str(artifact), str(target)]) == 0
    assert f"copy: {WEIGHTS}" in capsys.readouterr().err
