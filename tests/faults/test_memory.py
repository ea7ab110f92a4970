"""A load that runs out of memory, at any of its steps: an address space that is too small for it (RLIMIT_AS)."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from support.fault_processes import script

REFUSAL = "ARTIFACT: memory ran out while it was opened; raise the limit of this process (ulimit -v, or its container's), or free some"
LARGE = 16 << 20  # bytes: more than what the allocator has at hand, so that the limit is felt


@pytest.fixture(scope="module")
def found(toy_artifact, tmp_path_factory):
    work = tmp_path_factory.mktemp("memory")
    artifact = shutil.copytree(toy_artifact, work / "artifact")
    save_file({"large": torch.zeros(LARGE, dtype=torch.uint8)}, artifact / "weights/large.safetensors")
    data = (artifact / "weights/large.safetensors").read_bytes()
    manifest = json.loads((artifact / "manifest.json").read_text())
    entry = {"path": "weights/large.safetensors", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"].append(entry)
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    (work / "tmp").mkdir()
    return script("memory_limits.py", artifact, toy_artifact, work / "cache", TMPDIR=str(work / "tmp"))


def test_a_load_without_enough_memory_says_so(found):
    said = {load["said"] for load in found["loads"] if load["error"]}
    assert {load["error"] for load in found["loads"]} == {None, "ArtifactError"}
    assert said == {REFUSAL}


def test_memory_ran_out_at_more_than_one_step(found):
    """Else the limits are not chosen well, and this shows nothing."""
    causes = [load["cause"] for load in found["loads"] if load["error"]]
    assert any("large.safetensors" in cause for cause in causes)
    assert any("safetensors" not in cause for cause in causes)
    assert None in [load["error"] for load in found["loads"]]


def test_what_was_refused_leaves_nothing_behind(found):
    assert [load["held"] for load in found["loads"]] == [[]] * len(found["loads"])


def test_the_process_can_load_it_after_that(found):
    assert found["right again"]
