"""The same recipe, weights and toolchain give the same bytes, wherever and whenever they are exported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prebake.runtime.manifest import read_manifest

EXPORT = [sys.executable, "-m", "prebake.exporter", "export", "--no-cache", "--no-verify", "--quiet"]
RECIPE = ["--recipe", "flux-fast", "--model", "tiny:flux", "--set", "sampler.steps=6", "--set", "cache.method=pab"]
BACKENDS = {
    "onnxruntime": ["--set", "compile.backend=onnxruntime"],
    "tensorrt": ["--set", "compile.backend=tensorrt"],
    "aoti": [],
}


def exported(folder: Path, arguments: list[str], seed: str, locale: str) -> Path:
    """An export in a fresh process, with temporary files, working folder, output, hash seed and locale of its own."""
    (folder / "tmp").mkdir(parents=True)
    (folder / "here").mkdir()
    places = {"TMPDIR": str(folder / "tmp"), "PYTHONHASHSEED": seed, "LC_ALL": locale, "OMP_NUM_THREADS": "1"}
    output = folder / "artifacts" / "it"
    subprocess.run(
        [*EXPORT, *RECIPE, *arguments, "--output", str(output)],
        cwd=folder / "here",
        env={**os.environ, **places},
        check=True,
    )
    return output


def digests(artifact: Path) -> dict[str, str]:
    """Path -> sha256 of every file outside `reports`, the manifest among them."""
    paths = (p for p in artifact.rglob("*") if p.is_file() and p.relative_to(artifact).parts[0] != "reports")
    return {p.relative_to(artifact).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_exports_give_the_same_bytes(tmp_path, backend):
    first = exported(tmp_path / "a", BACKENDS[backend], "1", "C")
    second = exported(tmp_path / "b" / "further", BACKENDS[backend], "2", "C.UTF-8")
    assert digests(first) == digests(second)
    manifest = read_manifest(first)
    assert manifest.reproducible
    assert {f.path for f in manifest.files} | {"manifest.json"} == digests(first).keys()
    for path in first.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_where_kernels_are_chosen_by_their_times_it_is_said():
    from prebake.exporter.lower import load_backend
    from prebake.exporter.recipe.resolve import Compile

    aoti, tensorrt = load_backend("aoti"), load_backend("tensorrt")
    assert aoti.reproducible(Compile())
    assert not aoti.reproducible(Compile(inductor={"max_autotune": True}))
    assert aoti.reproducible(Compile(inductor={"max_autotune": False}))
    assert tensorrt.reproducible(Compile(backend="tensorrt"))
    assert not tensorrt.reproducible(Compile(backend="tensorrt", options={"flavour": "tensorrt"}))
