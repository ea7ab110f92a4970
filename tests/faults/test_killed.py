"""kill -9 at every step of what puts files on a disk, an export's folder and the machine code that a load unpacks; and several
processes that do so at once."""

import signal

import pytest

from support.fault_processes import script
from support.paper_artifact import write_package


@pytest.mark.parametrize("state", ["fresh", "damaged"])
def test_while_code_is_unpacked(tmp_path, state):
    write_package(tmp_path / "p.pt2")
    *deaths, lived, begun, half = script("unpack_kills.py", tmp_path / "p.pt2", tmp_path / "cache", state)
    assert len(deaths) > 8
    assert {death["signal"] for death in deaths} == {signal.SIGKILL}
    assert {begun["signal"], half["signal"]} == {signal.SIGXFSZ}
    for found in (*deaths, lived, begun, half):
        assert found["left"] in (("nothing", "the whole") if state == "fresh" else ("a part", "the whole"))
        assert found["next is right"]
        assert found["after that"] == ["c0de"]


@pytest.fixture(scope="module")
def staging(tmp_path_factory):
    return script("staging_kills.py", tmp_path_factory.mktemp("staging") / "work")


@pytest.mark.parametrize("how", ["exchange", "renames"])
@pytest.mark.parametrize("before", ["nothing", "old"])
def test_while_an_artifact_is_written(staging, before, how):
    *deaths, lived = staging[f"{before} {how}"]
    assert len(deaths) > 15
    assert {death["signal"] for death in deaths} == {signal.SIGKILL}
    assert lived["left"] == "new"
    for found in deaths:
        moved_aside = (
            how == "renames" and found["left"] == "nothing"
        )  # between two steps, and the next run puts it back
        assert found["left"] in (before, "new") or moved_aside
        assert found["next"] == "new"
        assert found["after that"] == ["out"]


def test_an_export_that_writes_in_place_would_be_seen(staging):
    assert "a part" in [death["left"] for death in staging["naive"]]


# --- and several at once, which the same process has tried ------------------------------------------------------------


def test_of_exports_to_one_output_one_wins_and_the_others_are_told(staging):
    for found in staging["at once"]:
        assert found == {"codes": [0, 3, 3, 3, 3, 3], "left": "new", "after that": ["out"]}


def test_of_exports_by_force_each_ends_well_and_one_is_left(staging):
    for found in staging["at once, by force"]:
        assert found == {"codes": [0] * 6, "left": "new", "after that": ["out"]}


def test_of_processes_that_unpack_the_same_code_each_gets_it(tmp_path):
    write_package(tmp_path / "p.pt2")
    assert script("concurrent_unpacks.py", tmp_path / "p.pt2", tmp_path / "cache") == {"wrong": [], "left": []}
