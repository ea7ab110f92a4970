"""Whole exports while something goes wrong. Most of them take minutes on a busy machine; `test_killed.py` has the quick part."""

import signal

import pytest

from support.fault_processes import script

STAGES = ("load", "settle", "rewrite", "plan", "capture", "lower", "package", "verify")
HARMLESS = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"}


@pytest.mark.slow
def test_killed_at_every_moment(tmp_path):
    """The artifact before stays as it was, nothing has the name of a new one, and the next export clears up."""
    found = script("export_faults.py", tmp_path, "killed")
    assert {f"{stage} is done" for stage in STAGES} <= found["deaths"].keys()
    for moment, death in found["deaths"].items():
        assert death == {"signal": signal.SIGKILL, "old": "as it was", "new": "nothing"}, moment
    assert found["leftovers"] > 0  # else nothing was there to be cleared
    assert found["next"] == ["the whole"] * 2
    assert found["after that"] == ["new", "old"]


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path):
    """From no room at all up to room for the whole artifact: each is a sentence, and leaves nothing."""
    mounts = f"mkdir {tmp_path}/disk; mount -t tmpfs -o size=64m none {tmp_path}/disk"
    *short, enough = script("export_faults.py", tmp_path, "full", mounts=mounts)
    assert (enough["said"], enough["left"]) == ("", ["out"])
    assert len(short) > 4
    for found in short:
        assert found["said"].startswith("ExportError: WORK/disk/out: cannot be written, since WORK/disk"), found
        assert found["said"].endswith(
            "says 'No space left on device'; make room, or choose another --output or TMPDIR"
        ), found
        assert set(found["left"]) <= {"ballast"}, found


def test_a_weight_that_is_not_a_number(tmp_path):
    found = script("export_faults.py", tmp_path, "nan")
    assert found["said"] == (
        "ExportError: evaluation 0 of 2 of plan '2': the latents are not finite (64 NaN of 1024); "
        "set precision.denoiser to float32 or quantize.method to none to find out where they come from"
    )
    assert found["left"] == []


@pytest.mark.slow
def test_two_exports_to_one_output(tmp_path):
    found = script("export_faults.py", tmp_path, "two")
    refused = (
        "RequestError: WORK/out-False: already exists since this export began; "
        "choose another --output, or replace it with --force"
    )
    assert found["force False"] == {"codes": [0, 0], "said": ["", refused], "left": "the whole", "hidden": []}
    assert found["force True"] == {"codes": [0, 0], "said": ["", ""], "left": "the whole", "hidden": []}


@pytest.mark.slow
def test_another_locale_time_zone_and_day(tmp_path):
    """The same bytes, but for the code of this backend, which torch numbers anew in each export."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    here = script("export_faults.py", tmp_path / "a", "once")
    there = script("export_faults.py", tmp_path / "b", "once", **HARMLESS)
    assert here == there
    assert len(here) > 5
