"""AOTInductor's compiler, where it is missing, or where the export that began it is killed."""

import pytest

from support.fault_processes import script


def test_an_export_without_a_compiler_says_so(tmp_path):
    said = script("compiler_faults.py", tmp_path, "none")
    assert said.startswith("graph 'toy': AOTInductor could not compile it (")
    assert "No working C++ compiler found" in said


@pytest.mark.slow
def test_killed_while_the_compiler_runs(tmp_path):
    """What it leaves running, on another graph, is in the way of nobody who compiles in the same folder."""
    found = script("compiler_faults.py", tmp_path, "killed")
    assert found["compiler"] == "cc1plus"
    assert any(name.endswith(".so") for name in found["files"])
    assert found["same"]
