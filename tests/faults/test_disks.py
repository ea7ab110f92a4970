"""Disks that are full, read-only, without execution, or not there, as file systems of a namespace of its own."""

import pytest

from support import disk_mounts as places
from support.fault_processes import script


@pytest.fixture(scope="module")
def found(toy_artifact, tmp_path_factory):
    work = tmp_path_factory.mktemp("places")
    found = script("disk_mounts.py", toy_artifact, work, mounts=places.mounts(toy_artifact, work))
    assert found.keys() == {*LOADED, *REFUSED, *NOT_RUN}
    return found


NO_ROOM = "give load() a cache_dir that can be written and has room, on a disk that allows execution"
LOADED = {
    # case: packages in the cache
    "the artifact is read-only": 3,
    "the cache is full": 0,
    "the cache is read-only": 0,
    "TMPDIR is missing": 3,
    "TMPDIR is missing and the cache is read-only": 0,
}
NOT_RUN = ("the cache allows no execution", "temporary files allow no execution")
REFUSED = {
    "the cache and temporary files are full": (
        "WORK/full/cache: machine code cannot be unpacked there (No space left on device), "
        f"nor into a temporary folder (No space left on device); {NO_ROOM}"
    ),
    "nothing can be written": (
        "WORK/sealed/cache: machine code cannot be unpacked there (Read-only file system), "
        f"nor into a temporary folder (No usable temporary directory found in ['WORK/missing']); {NO_ROOM}"
    ),
}


@pytest.mark.parametrize("case", LOADED)
def test_it_is_loaded_all_the_same(found, case):
    assert found[case] == {"said": "", "same": True, "left": [], "entries": LOADED[case]}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_words(found, case):
    assert found[case] == {"said": REFUSED[case], "same": False, "left": [], "entries": 0}


@pytest.mark.parametrize("case", NOT_RUN)
def test_where_code_may_not_run_it_says_what_to_give(found, case):
    said = found[case]["said"]
    assert said.startswith("WORK/noexec/")
    assert ".wrapper.so: expected a model compiled by AOTInductor, but " in said
    assert "failed to map segment from shared object" in said
    assert said.endswith("; its disk allows no execution, so give load() a cache_dir on one that does")
    assert (found[case]["same"], found[case]["left"]) == (False, [])


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path):
    """Before anything is loaded: a folder that is read-only for everybody, an administrator too."""
    mounts = f"mkdir {tmp_path}/sealed; mount -t tmpfs -o ro none {tmp_path}/sealed"
    code = f"""
import json
from pathlib import Path
from prebake.exporter.package.folder import RequestError, stage_folder
try:
    with stage_folder(Path({str(tmp_path / "sealed" / "out")!r}), force=False):
        said = "it was begun"
except RequestError as e:
    said = str(e)
print(json.dumps(said))
"""
    (tmp_path / "staged.py").write_text(code)
    said = script(tmp_path / "staged.py", mounts=mounts)
    assert said == f"{tmp_path}/sealed: cannot be written by this user; choose another --output"
