"""Where a load may and may not write: `python disk_mounts.py ARTIFACT WORK` loads from and to disks that are full, read-only,
without execution, or not there. Prints what came of each, as JSON: {case: {"said": ..., "left": [...], "same": ...}}.

Runs with the mounts of `mounts` made, in a namespace of its own: `test_disks.py`.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from prebake.runtime import ArtifactError, load


def mounts(artifact: Path, work: Path) -> str:
    """The shell commands that make the disks: a small one that is filled up, one without execution, two that are read-only."""
    return f"""
        mkdir -p {work}/full {work}/noexec {work}/sealed {work}/artifact {work}/good
        mount -t tmpfs -o size=16k none {work}/full
        head -c 12k /dev/zero > {work}/full/ballast
        mount -t tmpfs -o noexec none {work}/noexec
        mount -t tmpfs -o ro none {work}/sealed
        mount --bind {artifact} {work}/artifact
        mount -o remount,bind,ro {work}/artifact
    """


CASES = {
    # case: (cache_dir, TMPDIR)
    "the artifact is read-only": ("good/cache", "good"),
    "the cache is full": ("full/cache", "good"),
    "the cache and temporary files are full": ("full/cache", "full"),
    "the cache is read-only": ("sealed/cache", "good"),
    "nothing can be written": ("sealed/cache", None),
    "the cache allows no execution": ("noexec/cache", "good"),
    "temporary files allow no execution": ("sealed/cache", "noexec"),
    "TMPDIR is missing": ("good/cache", "missing"),
    "TMPDIR is missing and the cache is read-only": ("sealed/cache", "missing"),
}


def main(artifact: Path, work: Path) -> dict[str, dict]:
    expected = latents(artifact, work / "good" / "expected")
    return {case: one(work, cache, temporary, expected) for case, (cache, temporary) in CASES.items()}


def latents(folder: Path, cache: Path) -> torch.Tensor:
    return load(folder, cache_dir=cache)("a red circle", seed=7, output_type="latent")[0]


def one(work: Path, cache: str, temporary: str | None, expected: torch.Tensor) -> dict:
    """What is said, whether the latents are right, and what is left besides whole cache entries."""
    before = listing(work)
    choose(work, temporary)
    said, same = "", False
    try:
        same = torch.equal(latents(work / "artifact", work / cache), expected)
    except ArtifactError as e:
        said = str(e)
    left = {p for p in listing(work) - before if any(part.startswith((".", "prebake-")) for part in Path(p).parts)}
    entries = [p.name for p in (work / cache).glob("*") if p.name != "verified"]
    shutil.rmtree(work / cache, ignore_errors=True)
    return {"said": said.replace(str(work), "WORK"), "same": same, "left": sorted(left), "entries": len(entries)}


def choose(work: Path, temporary: str | None) -> None:
    """The folder for temporary files, from now on. Python would pass over a full one, unless a program names it."""
    tempfile.tempdir = str(work / temporary) if temporary == "full" else None
    tempfile._candidate_tempdir_list = CANDIDATES if temporary else lambda: [str(work / "missing")]
    os.environ["TMPDIR"] = str(work / (temporary or "missing"))


CANDIDATES = tempfile._candidate_tempdir_list


def listing(work: Path) -> set[str]:
    return {p.relative_to(work).as_posix() for p in work.rglob("*")}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
