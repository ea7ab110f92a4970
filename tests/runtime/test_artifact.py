"""What opening an artifact does and does not do: contracts, constants, the cache of machine code, memory, imports."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prebake.runtime import ArtifactError, load
from prebake.runtime.artifact import open_artifact
from prebake.runtime.backends import aoti
from prebake.runtime.storage.private_folder import default_cache_folder
from prebake.runtime.storage.unpack import read_members, unpack_members
from prebake.runtime.weights import map_weights
from support import toy_model as toy


@pytest.fixture(scope="module")
def artifact(toy_artifact, cache_dir):
    return open_artifact(toy_artifact, cache_dir=cache_dir)


def python(code, *args, **env):
    """What a fresh process prints, parsed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- constants --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unbound(toy_artifact, tmp_path):
    """The toy's decoder, opened and without constants."""
    data = (toy_artifact / "graphs/vae_decoder.pt2").read_bytes()
    with unpack_members(read_members("p", data), "x", tmp_path / "cache") as libraries:
        return aoti.open_model(libraries["vae_decoder"], torch.device("cpu"))


def test_a_graph_is_not_callable_before_its_constants_are_bound(unbound):
    with pytest.raises(ArtifactError, match=r"'vae_decoder': called before its 2 constants were bound"):
        unbound([torch.zeros(1, toy.N, toy.C)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out.bias": None}, "graph 'vae_decoder': constant 'out.bias' is not bound (1 in all); export again"),
        ({"more": torch.zeros(1)}, "graph 'vae_decoder': has no constant 'more' (1 in all); export again"),
        (
            {"out.bias": torch.zeros(192, dtype=torch.float16)},
            "graph 'vae_decoder': constant 'out.bias' was compiled for torch.float32, the weight file holds torch.float16; export again",
        ),
        (
            {"out.bias": torch.zeros(191, 2)},
            "graph 'vae_decoder': constant 'out.bias' was compiled for 768 bytes (to the next 64), "
            "the weight file holds 1528 in the shape [191, 2]; export again",
        ),
    ],
)
def test_constants_must_be_exactly_the_compiled_ones(unbound, eager, change, words):
    tensors = {**eager.decoder.state_dict(), **change}
    with pytest.raises(ArtifactError) as caught:
        unbound.bind({name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert str(caught.value) == words
    with pytest.raises(ArtifactError, match="called before"):
        unbound([torch.zeros(1, toy.N, toy.C)])


def test_variants_are_bound_to_the_same_mapped_tensors(artifact, toy_artifact):
    full, reuse = (artifact.graphs[name].graph.constants for name in ("full", "reuse"))
    assert set(reuse.values()) < set(full.values())
    maps = Path("/proc/self/maps").read_text()
    assert str(toy_artifact / "weights/denoiser.safetensors") in maps


def test_channels_last_tensors_are_views_of_what_is_stored(tmp_path):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save_file({"w": x.permute(0, 2, 3, 1)}, tmp_path / "w.safetensors")
    got = map_weights({tmp_path: tmp_path / "w.safetensors"}, torch.device("cpu"), ["w"])["w"]
    assert torch.equal(got, x)
    assert got.stride() == x.stride()


def test_complex_tensors_are_views_of_what_is_stored(tmp_path):
    x = torch.randn(3, 4, dtype=torch.complex128)
    save_file({"w": torch.view_as_real(x)}, tmp_path / "w.safetensors")
    got = map_weights({tmp_path: tmp_path / "w.safetensors"}, torch.device("cpu"), complex=["w"])["w"]
    assert torch.equal(got, x)


# --- the cache of machine code ----------------------------------------------------------------------------------------


def test_the_cache_is_private_and_holds_no_leftovers(toy_artifact, tmp_path):
    open_artifact(toy_artifact, cache_dir=tmp_path / "cache")
    folders = [tmp_path / "cache", *(tmp_path / "cache").iterdir()]
    assert len([folder for folder in folders if folder.name != "verified"]) == 1 + 3  # a package each
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert not [folder.name for folder in folders if folder.name.startswith(".")]


def test_a_second_load_writes_nothing(toy_artifact, tmp_path):
    def times():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}

    open_artifact(toy_artifact, cache_dir=tmp_path / "cache")
    before = times()
    open_artifact(toy_artifact, cache_dir=tmp_path / "cache")
    assert times() == before


def _tampered(folder):
    so = next(folder.rglob("*.so"))
    so.write_bytes(so.read_bytes()[:-1] + b"x")


def _half(folder):
    next(folder.rglob("*.so")).unlink()


def _crowded(folder):
    (folder / "vae_decoder" / "evil.json").write_text("{}")


def _linked(folder):
    so = next(folder.rglob("*.so"))
    so.rename(folder.parent / "moved.so")
    so.symlink_to(folder.parent / "moved.so")


def _open_to_all(folder):
    folder.chmod(0o777)


def _replaced_by_link(folder):
    folder.rename(folder.parent / "moved")
    folder.symlink_to(folder.parent / "moved")


@pytest.mark.parametrize("damage", [_tampered, _half, _crowded, _linked, _open_to_all, _replaced_by_link])
def test_a_damaged_cache_entry_is_replaced(toy_artifact, tmp_path, damage):
    package = toy_artifact / "graphs/vae_decoder.pt2"
    with unpack_members(read_members("p", package.read_bytes()), "x", tmp_path / "cache") as libraries:
        good = libraries["vae_decoder"].read_bytes()
    damage(tmp_path / "cache/x")
    with unpack_members(read_members("p", package.read_bytes()), "x", tmp_path / "cache") as libraries:
        so = libraries["vae_decoder"]
        assert so.read_bytes() == good
        assert not so.is_symlink()
        assert so.is_relative_to(tmp_path / "cache/x")
        assert stat.S_IMODE((tmp_path / "cache/x").lstat().st_mode) == 0o700
        assert not (so.parent / "evil.json").exists()


def test_many_may_unpack_at_once(toy_artifact, tmp_path):
    data = (toy_artifact / "graphs/vae_decoder.pt2").read_bytes()

    def unpack(_):
        with unpack_members(read_members("p", data), "x", tmp_path / "cache") as libraries:
            so = libraries["vae_decoder"]
            assert so.is_relative_to(tmp_path / "cache/x")
            return hash(so.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(unpack, range(32)))) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x"]


def test_a_cache_that_cannot_be_had_is_a_temporary_folder(toy_artifact, tmp_path):
    data = (toy_artifact / "graphs/vae_decoder.pt2").read_bytes()
    (tmp_path / "file").write_text("")
    with unpack_members(read_members("p", data), "x", tmp_path / "file" / "cache") as libraries:
        so = libraries["vae_decoder"]
        assert so.exists()
    assert not so.exists()


def test_a_cache_that_others_can_write_is_not_used(toy_artifact, tmp_path):
    data = (toy_artifact / "graphs/vae_decoder.pt2").read_bytes()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with unpack_members(read_members("p", data), "x", tmp_path / "cache") as libraries:
        assert not libraries["vae_decoder"].is_relative_to(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "prebake"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert default_cache_folder() == Path("/home/x/.cache/prebake")


def test_an_artifact_can_be_moved(artifact_copy, tmp_path, cache_dir):
    moved = shutil.move(artifact_copy, tmp_path / "elsewhere")
    assert len(load(moved, cache_dir=cache_dir)("red", seed=1).images) == 1


# --- what a process that replays does not pay for ---------------------------------------------------------------------

HEAVY = (
    "diffusers",
    "transformers",
    "torchao",
    "accelerate",
    "fastapi",
    "uvicorn",
    "torch._dynamo",
    "torch._inductor",
    "prebake.exporter",
)


def test_replaying_brings_in_no_compiler_and_no_model_library(toy_artifact, cache_dir):
    code = """
import json, sys
from prebake.runtime import load
load(sys.argv[1], cache_dir=sys.argv[2])("a red circle", seed=7).images[0]
print(json.dumps(sorted(sys.modules)))
"""
    loaded = python(code, toy_artifact, cache_dir)
    assert [m for m in HEAVY if m in loaded] == []


def test_loading_starts_no_process_and_needs_no_compiler(toy_artifact, cache_dir):
    code = """
import json, os, sys
import torch  # a build for CUDA, 2.14.1 for one, asks ldconfig here for its libraries
started = []
sys.addaudithook(lambda event, args: started.append(event) if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork") else None)
from prebake.runtime import load
load(sys.argv[1], cache_dir=sys.argv[2])("a red circle", seed=7)
print(json.dumps(started))
"""
    assert python(code, toy_artifact, cache_dir, PATH="/nonexistent") == []


def test_loading_takes_well_under_a_second(toy_artifact, cache_dir):
    code = """
import json, sys, time
import torch
from prebake.runtime import load
seconds = []
for _ in range(3):
    started = time.perf_counter()
    load(sys.argv[1], cache_dir=sys.argv[2])
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds))
"""
    assert min(python(code, toy_artifact, cache_dir)) < 0.5  # measured: 0.02 s


def test_light_modules_need_no_torch(toy_artifact):
    code = """
import json, sys
import prebake.runtime, prebake.runtime.errors, prebake.runtime.manifest, prebake.runtime.plan
from prebake.runtime import ArtifactError, __version__
from prebake.runtime.__main__ import main
sys.stdout, out = sys.stderr, sys.stdout
main(["inspect", sys.argv[1]])
print(json.dumps("torch" in sys.modules), file=out)
"""
    assert python(code, toy_artifact) is False


def test_importing_the_runtime_costs_hardly_more_than_torch():
    """CPU seconds, both in one process, so that a busy machine does not matter."""
    code = """
import json, time
started = time.process_time()
import torch
torch_done = time.process_time()
from prebake.runtime import load
print(json.dumps([torch_done - started, time.process_time() - torch_done]))
"""
    ratios = [1 + ours / torchs for torchs, ours in (python(code) for _ in range(3))]
    assert min(ratios) < 1.3  # measured: 1.2, most of it pydantic


def test_unknown_names_are_attribute_errors():
    import prebake.runtime

    assert set(prebake.runtime.__all__) <= set(dir(prebake.runtime))
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = prebake.runtime.nope


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import json, sys
import torch
from prebake.runtime.artifact import open_artifact

def memory():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {k: int(fields[k].split()[0]) / 1024 for k in ("VmRSS", "RssAnon", "RssFile")}

before = memory()
graphs = open_artifact(sys.argv[1], cache_dir=sys.argv[2]).graphs
opened = memory()
x = {"x": torch.ones(1, 4096)}
graphs["full"](x)
one = memory()
graphs["reuse"](x)
two = memory()
print(json.dumps([before, opened, one, two]))
"""


class Wide(torch.nn.Module):
    """Four layers of 64 MiB each."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def build_wide(folder):
    """An artifact of two variants, which are the same graph, on 256 MiB of random weights."""
    x, wide = torch.ones(1, 4096), Wide().eval()
    toy.compile_package(folder / "graphs/denoiser.pt2", {"full": (wide, (x,))})
    _add_copy(folder / "graphs/denoiser.pt2", "full", "reuse")
    (folder / "weights").mkdir()
    save_file(wide.state_dict(), folder / "weights/w.safetensors")
    constants = {name: name for name in wide.state_dict()}
    package, io = "graphs/denoiser.pt2", (toy.specs(x=x), toy.specs(y=x))
    graphs = tuple(toy.graph(name, package, *io, constants) for name in ("full", "reuse"))
    toy.write_manifest(folder, graphs=graphs, plans={}, pipeline={})


def _add_copy(path, model, copy):
    """Puts the model's members into the package a second time, as another model: compiling it again would be the same."""
    with zipfile.ZipFile(path, "a") as archive:
        for info in archive.infolist():
            if f"/{model}/" in info.filename:
                archive.writestr(zipfile.ZipInfo(info.filename.replace(f"/{model}/", f"/{copy}/")), archive.read(info))


def test_a_second_variant_adds_no_memory_for_weights(tmp_path):
    build_wide(tmp_path / "wide")
    before, opened, one, two = python(MEMORY, tmp_path / "wide", tmp_path / "cache")
    print(f"MiB before {before}, opened {opened}, one variant {one}, two variants {two}")
    weights = 256.0
    assert opened["VmRSS"] - before["VmRSS"] < 0.25 * weights  # nothing is read yet; hashing leaves no pages behind
    assert one["RssFile"] - before["RssFile"] > 0.9 * weights  # all of them are now, from the file
    assert one["RssAnon"] - before["RssAnon"] < 0.1 * weights  # and none was copied
    assert two["VmRSS"] - one["VmRSS"] < 0.1 * weights
