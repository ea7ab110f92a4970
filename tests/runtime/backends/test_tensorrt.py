"""How engines are bound and called, against a library that runs on the CPU and writes down what it is asked for."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prebake.runtime.artifact import device_of
from prebake.runtime.backends import OpenContext, tensorrt
from prebake.runtime.errors import ArtifactError
from prebake.runtime.manifest import Cost, Defaults, FileEntry, Graph, Manifest, Requires, Source, TensorSpec
from support import fake_tensorrt as fake

CPU = torch.device("cpu")
NEEDS = {"tensorrt_rtx": fake.VERSION, "cuda": "13", "compute_capability": "sm80 sm89"}
X, Y, W, UNREAD = (2, 3), (2, 4), (3, 4), (1,)
FULL = {
    "inputs": {"x": X, "unread": UNREAD},
    "outputs": {"y": Y},
    "engine": {"inputs": {"x": X, "w": W}},
    "scratch": 300,
}
SMALL = {"inputs": {"x": X}, "outputs": {"z": Y}, "engine": {"inputs": {"v": W, "x": X}}, "scratch": 40}


@pytest.fixture
def library(monkeypatch) -> fake.Library:
    monkeypatch.setattr(tensorrt, "ALIGNMENT_BYTES", 64)  # what torch's allocations on a CPU have
    return fake.install(monkeypatch)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(W, generator=torch.Generator().manual_seed(0))


def written(folder: Path, options: dict[str, Any] | None = None, **graphs: dict[str, Any]) -> Manifest:
    """A folder of engines and the part of its manifest that is read when they are opened."""
    described, files = [], []
    for name, graph in graphs.items():
        weight = next(n for n in graph["engine"]["inputs"] if n not in graph["inputs"])
        inside = {"output": graph["outputs"], "product": ("x", weight), "scratch": graph["scratch"], **graph["engine"]}
        data = graph.get("data") or fake.engine(**inside)
        (folder / f"{name}.engine").write_bytes(data)
        files.append(FileEntry(path=f"{name}.engine", size=len(data), sha256=hashlib.sha256(data).hexdigest()))
        described.append(
            Graph(
                name=name,
                package=f"{name}.engine",
                inputs=tuple(TensorSpec(name=n, shape=s, dtype="float32") for n, s in graph["inputs"].items()),
                outputs=tuple(TensorSpec(name=n, shape=s, dtype="float32") for n, s in graph["outputs"].items()),
                constants={weight: "denoiser.w"},
                cost=Cost(flops=0, ops=0, constants=1, constants_bytes=48),
            )
        )
    return Manifest(
        family="flux",
        backend="tensorrt",
        requires=needs(),
        source=Source(model="m", pipeline="FluxPipeline", sha256="0" * 64),
        toolchain={},
        recipe={"compile": {"options": options or {}}},
        defaults=Defaults(num_inference_steps=2, guidance_scale=3.5, height=8, width=8),
        pipeline={},
        graphs=tuple(described),
        plans={},
        files=tuple(files),
    )


def needs(**changes: str) -> Requires:
    packages = {name: version for name, version in {**NEEDS, **changes}.items() if version}
    return Requires(system="Linux", machine="x86_64", device="cuda", isa_level="any", isa=(), packages=packages)


def opened(folder: Path, weight: torch.Tensor, options: Any = None, **graphs: dict[str, Any]) -> Mapping[str, Any]:
    constants = {"full": {"w": weight, "not in the engine": weight}, "small": {"v": weight}}
    manifest = written(folder, options, **graphs)
    given = {n: constants[n] for n in graphs}
    return tensorrt.open_models(OpenContext(folder, manifest, given, CPU, folder / "cache"))


def changed(graph: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """The graph with another engine."""
    return graph | {"engine": graph["engine"] | engine}


def test_engines_compute_from_the_tensors_that_they_are_called_with_and_bound_to(tmp_path, library, weight):
    models = opened(tmp_path, weight, full=FULL, small=SMALL)
    for seed in range(3):
        x = torch.randn(X, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(models["full"]([x, torch.zeros(UNREAD)])[0], x @ weight)
        assert torch.equal(models["small"]([x])[0], x @ weight)
        assert not torch.equal(models["small"]([x + 1])[0], x @ weight)  # the canary


def test_all_engines_are_bound_to_one_copy_of_a_weight_once(tmp_path, library, weight):
    models = opened(tmp_path, weight, full=FULL, small=SMALL)
    for model, inputs in ((models["full"], [torch.ones(X), torch.ones(UNREAD)]), (models["small"], [torch.ones(X)])):
        model(inputs)
        model(inputs)
    bound = [address for event, name, address in filter(lambda e: e[0] == "address", library.events) if name in "wv"]
    assert bound == [weight.data_ptr()] * 2
    weight.zero_()  # as a weight that is swapped in place
    assert not models["full"]([torch.ones(X), torch.ones(UNREAD)])[0].any()


def test_outputs_of_two_calls_are_two_tensors(tmp_path, library, weight):
    model = opened(tmp_path, weight, small=SMALL)["small"]
    first, second = model([torch.ones(X)])[0], model([torch.zeros(X)])[0]
    assert first.any()
    assert not second.any()


def test_a_call_waits_for_the_callers_stream_and_the_caller_for_it(tmp_path, library, weight):
    model = opened(tmp_path, weight, small=SMALL)["small"]
    library.events.clear()
    (y,) = model([x := torch.ones(X)])
    assert library.events == [
        ("address", "x", x.data_ptr()),
        ("address", "z", y.data_ptr()),
        ("wait", fake.OWN, fake.CALLERS),
        ("execute", fake.OWN),
        ("compile",),
        ("wait", fake.CALLERS, fake.OWN),
    ]


def test_scratch_is_one_block_for_the_graph_that_needs_the_most(tmp_path, library, weight):
    opened(tmp_path, weight, full=FULL, small=SMALL)
    first, second = (event for event in library.events if event[0] == "scratch")
    assert first == second
    assert first[2] == 300


def test_a_row_of_a_table_is_copied_to_where_an_allocation_begins(tmp_path, library, weight):
    model = opened(tmp_path, weight, small=SMALL)["small"]
    table = torch.randn(5, *X, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model([table[1]])[0], table[1] @ weight)
    addresses = [event[2] for event in library.events if event[:2] == ("address", "x")]
    assert addresses != [table[1].data_ptr()]
    assert addresses[0] % 64 == 0


def test_weights_of_convolutions_are_seen_as_they_lie():
    """[N, C, H, W] in memory as [N, H, W, C], and 1 x 1 ones, whose memory is the same in both."""
    weight = torch.randn(5, 4, 3, 2)
    lying = weight.contiguous(memory_format=torch.channels_last)
    seen = tensorrt.weight_view(lying, (5, 3, 2, 4))
    assert seen.is_contiguous()
    assert seen.data_ptr() == lying.data_ptr()
    assert torch.equal(seen[:, 1, 0], weight[:, :, 1, 0])
    assert tensorrt.weight_view(weight[:, :, :1, :1].contiguous(), (5, 1, 1, 4)).shape == (5, 1, 1, 4)
    for other in (weight, lying):
        assert tensorrt.weight_view(other, (5, 4, 3, 2)) is other
    assert tensorrt.weight_view(weight, (5, 3, 2, 4)) is weight  # and then refused, by its shape


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (
            changed(SMALL, inputs={"v": (3, 5), "x": X}),
            r"'v' was built as float32 \[3, 5\], the artifact has float32 \[3, 4\]",
        ),
        (changed(SMALL, dtypes={"v": "BF16"}), r"'v' was built as bfloat16 \[3, 4\], the artifact has float32"),
        (changed(SMALL, inputs={"v": W, "x": (9, 3)}), r"'x' was built as float32 \[9, 3\]"),
        (changed(SMALL, locations={"x": "HOST"}), "'x' was built as"),
        (changed(SMALL, inputs={"v": W, "x": X, "u": W}), r"constant 'u' is not bound \(1 in all\)"),
        (changed(SMALL, output={"other": Y}), "output 'other' is not in both engine and manifest"),
        (
            SMALL | {"data": b"refused"},
            r"small\.engine: tensorrt_rtx .* refuses the engine: .*Engine: a reason; export",
        ),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_before_it_runs(tmp_path, library, weight, graph, said):
    with pytest.raises(ArtifactError, match=said):
        opened(tmp_path, weight, small=graph)
    assert not [event for event in library.events if event[0] == "execute"]


def test_a_changed_file_is_not_opened(tmp_path, library, weight):
    manifest = written(tmp_path, small=SMALL)
    (tmp_path / "small.engine").write_bytes(b"refused, had it been opened")
    with pytest.raises(ArtifactError, match="sha256 is"):
        tensorrt.open_models(OpenContext(tmp_path, manifest, {"small": {"v": weight}}, CPU))


def test_an_engine_that_fails_says_so(tmp_path, library, weight):
    model = opened(tmp_path, weight, small=changed(SMALL, fails=True))["small"]
    with pytest.raises(ArtifactError, match="graph 'small': TensorRT could not run it"):
        model([torch.ones(X)])


def test_the_artifacts_device_is_a_gpu_by_its_number_as_tensors_say_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_of(written(tmp_path, small=SMALL)) == torch.device("cuda:1")


# --- what was compiled for the GPU -----------------------------------------------------------------------------------


def compilations(library: fake.Library) -> list[str]:
    """What happened to what was compiled, since this was asked last."""
    said = [event[0] for event in library.events if event[0] in ("compile", "taken", "rejected")]
    library.events.clear()
    return said


def cached(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "cache").rglob("*") if p.is_file())


def test_what_was_compiled_for_a_gpu_is_not_compiled_again_by_the_next_process(tmp_path, library, weight):
    model = opened(tmp_path, weight, small=SMALL)["small"]
    assert cached(tmp_path) == []
    for _ in range(2):
        model([torch.ones(X)])
    assert compilations(library) == ["compile"]
    assert [p.read_bytes() for p in cached(tmp_path)] == [b"compiled"]
    opened(tmp_path, weight, small=SMALL)["small"]([torch.ones(X)])
    assert compilations(library) == ["taken"]


def test_it_is_kept_for_the_engine_the_library_and_the_gpu(tmp_path, library, weight, monkeypatch):
    opened(tmp_path, weight, small=SMALL)["small"]([torch.ones(X)])
    opened(tmp_path, weight, full=FULL)["full"]([torch.ones(X), torch.ones(UNREAD)])
    assert compilations(library) == ["compile"] * 2
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="another GPU"))
    opened(tmp_path, weight, small=SMALL)["small"]([torch.ones(X)])
    assert compilations(library) == ["compile"]
    assert len(cached(tmp_path)) == 3


def test_what_the_library_rejects_is_compiled_anew_and_replaced(tmp_path, library, weight):
    opened(tmp_path, weight, small=SMALL)["small"]([torch.ones(X)])
    (file,) = cached(tmp_path)
    file.write_bytes(b"of another driver")
    library.events.clear()
    opened(tmp_path, weight, small=SMALL)["small"]([torch.ones(X)])
    assert compilations(library) == ["rejected", "compile"]
    assert file.read_bytes() == b"compiled"


@pytest.mark.parametrize("what", ["file", "folder", "cache", "link"])
def test_what_others_could_have_written_is_not_read(tmp_path, library, weight, what):
    """It is native code."""
    opened(tmp_path, weight, small=SMALL)["small"]([torch.ones(X)])
    (file,) = cached(tmp_path)
    if what == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        {"file": file, "folder": file.parent, "cache": file.parent.parent}[what].chmod(0o777)
    library.events.clear()
    opened(tmp_path, weight, small=SMALL)["small"]([torch.ones(X)])
    assert compilations(library) == ["compile"]


def test_where_nothing_can_be_kept_it_runs_all_the_same(tmp_path, library, weight):
    (tmp_path / "cache").write_text("in the way")
    (y,) = opened(tmp_path, weight, small=SMALL)["small"]([torch.ones(X)])
    assert torch.equal(y, torch.ones(X) @ weight)


# --- CUDA graphs -----------------------------------------------------------------------------------------------------

GRAPHS = {"cuda_graphs": True}


def test_a_recorded_engine_computes_from_what_it_is_called_with(tmp_path, library, weight):
    models = opened(tmp_path, weight, GRAPHS, full=FULL, small=SMALL)
    drawn = [torch.randn(X, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    got = [(models["full"]([x, torch.zeros(UNREAD)])[0], models["small"]([x])[0]) for x in drawn]
    for x, outputs in zip(drawn, got, strict=True):  # all at the end: outputs of one call are not those of the next
        assert all(torch.equal(y, x @ weight) for y in outputs)
    weight.zero_()  # as a weight that is swapped in place
    assert not models["small"]([drawn[0]])[0].any()


def test_it_is_enqueued_once_recorded_once_and_then_launched(tmp_path, library, weight):
    model = opened(tmp_path, weight, GRAPHS, small=SMALL)["small"]
    library.events.clear()
    seen = []
    for _ in range(4):
        model([torch.ones(X)])
        seen.append([event[0] for event in library.events if event[0] != "wait"])
        waits = [event for event in library.events if event[0] == "wait"]
        assert waits == [("wait", fake.OWN, fake.CALLERS), ("wait", fake.CALLERS, fake.OWN)]
        library.events.clear()
    assert seen == [["execute", "compile"], ["record", "execute"], [], []]


def test_an_engine_that_cannot_be_recorded_is_enqueued_at_every_call(tmp_path, library, weight):
    model = opened(tmp_path, weight, GRAPHS, small=changed(SMALL, capturable=False))["small"]
    library.events.clear()
    for seed in range(3):
        x = torch.randn(X, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(model([x])[0], x @ weight)
    assert [event[0] for event in library.events if event[0] in ("execute", "record")] == ["execute"] * 3


# --- what the machine lacks ------------------------------------------------------------------------------------------


def test_the_same_version_is_no_problem(library):
    assert list(tensorrt.problems(needs())) == []


def test_another_version_is_one(library):
    (said,) = tensorrt.problems(needs(tensorrt_rtx="1.8.0.1"))
    assert said.startswith(f"was built with tensorrt_rtx 1.8.0.1, this is tensorrt_rtx {fake.VERSION}")


def test_a_missing_library_is_one_with_the_extra_that_has_it(monkeypatch, declared_extras):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (said,) = tensorrt.problems(needs(tensorrt_rtx="", tensorrt="11.4.0"))
    assert said.startswith("was built with tensorrt 11.4.0, which cannot be imported here")
    assert "pip install 'prebake[trt]'" in said


def test_a_manifest_without_a_flavour_is_one():
    (said,) = tensorrt.problems(needs(tensorrt_rtx=""))
    assert "names no flavour" in said


@pytest.mark.parametrize(
    ("cuda", "capability", "said"),
    [
        (13, (8, 9), []),
        (14, (8, 0), []),
        (12, (8, 9), ["needs a driver for CUDA 13, this one is for CUDA 12; update the NVIDIA driver"]),
        (
            13,
            (9, 0),
            ["was built for GPUs of compute capability sm80 sm89, this one has sm90; export again with sm90 among"],
        ),
        (12, (7, 5), ["needs a driver", "was built for GPUs"]),
    ],
)
def test_driver_and_gpu_are_compared_with_what_was_built_for(cuda, capability, said):
    found = list(tensorrt.gpu_problems(NEEDS, cuda, capability))
    assert len(found) == len(said)
    assert all(sentence.startswith(begin) for sentence, begin in zip(found, said, strict=True))


# --- with a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, GRAPHS])
def test_an_engine_of_the_library_computes_what_torch_does(tmp_path, options):
    """TF32 is what the library may multiply float32 in: 10 bits, so 1e-2 has room for 64 terms."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    builder = trt.Builder(tensorrt.engine_logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x, w = network.add_input("x", trt.float32, (16, 64)), network.add_input("w", trt.float32, (64, 32))
    product = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, w, trt.MatrixOperation.NONE).get_output(0)
    product.name = "y"
    network.mark_output(product)
    data = bytes(builder.build_serialized_network(network, builder.create_builder_config()))
    graph = {
        "inputs": {"x": (16, 64)},
        "outputs": {"y": (16, 32)},
        "engine": {"inputs": {"x": 0, "w": 0}},
        "scratch": 0,
    }
    manifest = written(tmp_path, options, full=graph | {"data": data})
    weight = torch.randn(64, 32, device="cuda")
    opening = OpenContext(tmp_path, manifest, {"full": {"w": weight}}, weight.device, tmp_path / "cache")
    for _ in range(2):  # the second takes what the first has compiled
        model = tensorrt.open_models(opening)["full"]
        for given in torch.randn(4, 16, 64, device="cuda"):
            torch.testing.assert_close(model([given])[0], given @ weight, rtol=1e-2, atol=1e-1)
        (kept,) = cached(tmp_path)
        assert kept.stat().st_size > 0
