"""AOTInductor for GPUs, as far as no GPU is needed: refusals, options, layers in 8 bits, graphs moved, weights sent over.

One test, marked `gpu`, exports and replays on one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.lower import aoti, w8a8
from prebake.exporter.lower.aoti import cuda
from prebake.exporter.quantize import METHODS, Int8Dynamic
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime import private_torch
from prebake.runtime.backends import aoti as runtime_aoti
from prebake.runtime.errors import ExportError, RecipeError
from prebake.runtime.gpu import capability as gpu
from prebake.runtime.gpu.upload import BUFFER_COUNT, upload_tensors
from prebake.runtime.manifest import Requires
from support.captured_pipeline import prepared

ON_GPU = "compile.device=cuda"


def recipe(*changes: str) -> Any:
    return resolve("flux-fast", changes, "tiny:flux")


@pytest.fixture
def a_gpu(monkeypatch):
    """torch says that there is a GPU of that compute capability, whose driver is for CUDA 13."""

    def has(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(runtime_aoti, "cuda_of_driver", lambda: 13)

    return has


# --- what is refused, and what is asked of the compiler ------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_export_for_a_gpu_that_is_not_here_is_refused_before_the_model_is_loaded():
    with pytest.raises(RecipeError, match=r"device 'cuda': .* sees none; export on such a machine"):
        aoti.adapt_recipe(recipe(ON_GPU))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            (ON_GPU, "compile.options.kernels=true"),
            "compile.options.kernels: for the CPU alone, .*leave the option out",
        ),
        (("compile.options.cuda_graphs=true",), "compile.options.cuda_graphs: it is for GPUs"),
        (("compile.options.tf32=true",), "compile.options.tf32: it is for GPUs, and compile.device is cpu; leave"),
        ((ON_GPU, "quantize.method=fp8_dynamic"), "GPUs multiply fp8 from sm89 on, this one is sm80; set quantize"),
        (
            (ON_GPU, "compile.options.multi=true"),
            "options of this backend: kernels, emulate_bfloat16, multi_arch, tf32, cuda_graphs",
        ),
    ],
)
def test_what_does_not_go_together(a_gpu, changes, words):
    a_gpu(8, 0)
    with pytest.raises(RecipeError, match=words):
        aoti.adapt_recipe(recipe(*changes))


@pytest.mark.parametrize(("option", "named"), [((), "sm90"), (("compile.options.multi_arch=true",), "sm90+")])
def test_the_gpu_goes_into_options_and_manifest(a_gpu, option, named):
    a_gpu(9, 0)
    asked = recipe(ON_GPU, "quantize.method=fp8_dynamic", *option)
    assert aoti.adapt_recipe(asked) == (asked, ())
    needs = aoti.requires(asked)
    assert needs["packages"] == {"compute_capability": named, "cuda": "13"}
    assert not {"avx512_vnni", "avx512_bf16", "avx_vnni"} & set(needs["isa"])  # of int8 products on the CPU
    flags = aoti.compile_flags(asked.compile)
    assert flags["aot_inductor.embed_kernel_binary"] is True
    assert flags["aot_inductor.emit_multi_arch_kernel"] is bool(option)
    assert flags["aot_inductor.package_constants_in_so"] is False
    assert flags["coordinate_descent_tuning"] is True  # the recipe's own
    assert not aoti.reproducible(asked.compile)  # kernels are chosen by their times
    assert not {"aot_inductor.embed_kernel_binary"} & aoti.compile_flags(recipe().compile).keys()


def test_tf32_is_the_compilers_alone():
    before = torch.get_float32_matmul_precision()
    with cuda.float32_as_tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
    with cuda.float32_as_tf32(False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("asked", "capability", "words"),
    [
        ("sm90", (9, 0), None),
        ("sm80", (8, 6), r"compute capability sm80, this one has sm86; export again on a machine with this GPU"),
        ("sm80+", (9, 0), None),
        ("sm90+", (8, 9), r"compute capability sm90\+, this one has sm89"),
        ("sm120", (12, 0), None),
        ("hopper", (9, 0), r"expected one such as sm90, got 'hopper'; export again"),
    ],
)
def test_a_gpu_of_another_kind_is_refused_before_anything_is_opened(a_gpu, asked, capability, words):
    a_gpu(*capability)
    requires = needed(compute_capability=asked, cuda="13")
    if words is None:
        assert list(runtime_aoti.problems(requires)) == []
    else:
        with pytest.raises(AssertionError, match=words):
            assert not (said := list(runtime_aoti.problems(requires))), said


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("14", "needs a driver for CUDA 14, this one is for CUDA 13; update the NVIDIA driver"),
        ("new", "expected a number"),
    ],
)
def test_a_driver_that_is_too_old_is_refused(a_gpu, asked, words):
    a_gpu(9, 0)
    (said,) = runtime_aoti.problems(needed(compute_capability="sm90", cuda=asked))
    assert words in said


def test_the_driver_says_for_which_cuda_it_is(monkeypatch):
    def says(version) -> int:
        version._obj.value = 13020
        return 0

    driver = SimpleNamespace(cuDriverGetVersion=says)
    monkeypatch.setattr(gpu.ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    assert gpu.cuda_of_driver() == 13


@pytest.mark.parametrize("has_it", [True, False])
def test_a_flag_that_torch_does_not_know_is_left_out(monkeypatch, has_it):
    monkeypatch.setattr(aoti, "has_line_tables", lambda: has_it)
    assert ("aot_inductor.enable_line_tables" in aoti.compile_flags(recipe().compile)) is has_it


def test_nothing_is_asked_of_a_gpu_for_the_cpu(a_gpu):
    a_gpu(9, 0)
    assert not list(runtime_aoti.problems(needed().model_copy(update={"device": "cpu"})))


def needed(**packages: str) -> Requires:
    return Requires(system="Linux", machine="x86_64", device="cuda", isa_level="any", isa=(), packages=packages)


def test_a_capability_has_the_name_that_nvidia_gives_it():
    assert [gpu.capability_name(c) for c in ((9, 0), (12, 1))] == ["sm90", "sm121"]


@pytest.mark.parametrize("takes", [3, 5])
def test_torchs_runner_is_asked_for_the_single_threaded_entry_where_it_has_one(monkeypatch, takes):
    def runner(*given):
        if len(given) > takes:
            raise TypeError("incompatible constructor arguments")
        return given

    fake = SimpleNamespace(AOTIModelContainerRunnerCuda=runner)
    monkeypatch.setattr(private_torch, "_aoti", fake)
    made = private_torch.open_cuda_runner(Path("model.so"), torch.device("cuda", 0))
    assert made == ("model.so", 1, "cuda:0", "", True)[:takes]


# --- layers in 8 bits ----------------------------------------------------------------------------------------------------


def layers(method: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A Linear as a GPU will have it, and as the operator that defines what it computes."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(64, 48, dtype=dtype)})
    same = copy.deepcopy(model)
    cuda.quantize_layers(model, {"a"}, METHODS[method]())
    w8a8.replace_layers(same, {"a"}, METHODS[method]())
    return model["a"], same["a"]


@pytest.mark.parametrize(
    ("method", "dtype", "tolerance"),
    [
        ("int8_dynamic", torch.float32, 1e-6),  # the same sums in the same order, but for one factor's place
        ("int8_dynamic", torch.bfloat16, 4e-3),  # half a unit of bfloat16's last place, at the end
        ("fp8_dynamic", torch.bfloat16, 8e-3),  # and once more where the product comes out in bfloat16
    ],
)
def test_layers_compute_what_the_operator_says(method, dtype, tolerance):
    ours, operator = layers(method, dtype)
    x = torch.randn(2, 20, 64, dtype=dtype)
    if method == "fp8_dynamic" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 multiplies fp8 by rows on GPUs alone; install torch 2.13")

    def error(scale: float) -> float:
        with torch.no_grad():
            expected = operator(x).float()
            return float((ours(x * scale).float() - expected).norm() / expected.norm())

    assert error(1.0) < tolerance < error(1.05)  # the second is the canary


@pytest.mark.parametrize("method", ["int8_dynamic", "fp8_dynamic"])
def test_layers_are_captured_as_operators_of_every_device(method):
    ours, _ = layers(method, torch.bfloat16)
    graph = capture_graph("layer", nn.Sequential(ours), (torch.randn(20, 64, dtype=torch.bfloat16),), ("x",), ("y",))
    targets = {str(n.target) for n in graph.gm.graph.nodes if n.op == "call_function"}
    product = {"int8_dynamic": "aten._int_mm.default", "fp8_dynamic": "aten._scaled_mm.default"}[method]
    assert product in targets
    assert all(t.startswith("aten.") for t in targets)
    weights = [t for t in graph.constants().values() if t.element_size() == 1]
    assert [tuple(w.shape) for w in weights] == [(48, 64)]  # by rows, as they are stored and shared


def test_what_a_gpu_cannot_multiply_is_refused():
    model = nn.ModuleDict({"odd": nn.Linear(64, 40)})
    with pytest.raises(ExportError, match=r"'odd': .* of 16 features .* got 64x40; add its name to"):
        cuda.quantize_layers(model, {"odd"}, Int8Dynamic())


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_few_rows_are_filled_up(monkeypatch, rows):
    ours, operator = layers("int8_dynamic", torch.float32)
    given, multiply = [], torch._int_mm
    x = torch.randn(rows, 64)
    expected = operator(x)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: given.append(a.shape[0]) or multiply(a, b))
    # the same sums in the same order, but for one factor's place
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)
    assert given == [17]  # what torch asks for on a GPU


# --- graphs on the device ------------------------------------------------------------------------------------------------


class Made(nn.Module):
    """Reads one tensor by two names, and makes tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.same = self.weight
        self.register_buffer("offset", torch.randn(64))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        steps = torch.arange(64, dtype=torch.float32, device=x.device)
        return (x @ self.weight + self.same * steps + self.get_buffer("offset") + x.new_zeros(64),)


def test_a_graph_moves_with_all_that_it_makes():
    graph = capture_graph("made", Made(), (torch.randn(64, 64),), ("x",), ("y",))
    there = cuda.move_graph(graph, torch.device("meta"))
    (y,) = there.gm(*there.args)
    assert y.device.type == "meta"
    assert {t.device.type for t in there.constants().values()} == {"meta"}
    assert there.constants().keys() == graph.constants().keys()
    assert {t.device.type for t in graph.constants().values()} == {"cpu"}  # it is what is stored
    assert there.inputs == graph.inputs


@pytest.mark.parametrize(
    ("name", "model", "method"),
    [
        ("flux-fast", "tiny:flux", "int8_dynamic"),
        pytest.param("flux-fast", "tiny:flux", "fp8_dynamic", marks=pytest.mark.slow),
        pytest.param("sdxl-fast", "tiny:sdxl", "int8_dynamic", marks=pytest.mark.slow),
        pytest.param("cogvideox-fast", "tiny:cogvideox", "int8_dynamic", marks=pytest.mark.slow),
    ],
)
def test_every_graph_of_a_pipeline_moves(monkeypatch, name, model, method):
    """A tensor that stayed on the CPU would meet one that has no memory, and be refused."""
    monkeypatch.setattr(cuda, "check_gpu_recipe", lambda recipe: None)
    ready = prepared(resolve(name, (ON_GPU, f"quantize.method={method}", "cache.method=pab"), model))
    assert {"int8_dynamic": "int8", "fp8_dynamic": "fp8"}[method] in {
        treatment for treatment, _ in ready.layers.values()
    }
    graphs = [graph for group in ready.graphs.values() for graph in group]
    assert {"full", "reuse", "text_encoder", "vae_decoder"} <= {graph.name for graph in graphs}
    for graph in graphs:
        there = cuda.move_graph(graph, torch.device("meta"))
        made = there.gm(*there.args)
        assert [(tuple(t.shape), t.device.type) for t in made] == [(s.shape, "meta") for s in graph.outputs], graph.name


def test_an_operator_of_the_cpu_does_not_move():
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> tuple[Tensor]:
            return (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0].contiguous(),)

    graph = capture_graph("attention", Attention(), (torch.randn(1, 2, 8, 16),), ("q",), ("y",))
    with pytest.raises(ExportError, match=r"'attention': .*_for_cpu.* of the CPU, so it cannot move"):
        cuda.move_graph(graph, torch.device("meta"))


def test_each_graph_is_compiled_on_the_gpu_with_its_options(a_gpu, monkeypatch, tmp_path):
    a_gpu(9, 0)
    graph = capture_graph("made", Made(), (torch.randn(64, 64),), ("x",), ("y",))
    moved, written = [], {}

    def compiled(graph, flags):
        moved.append((graph.args[0].device.type, flags, torch.get_float32_matmul_precision()))
        return {"model.so": b""}

    onto = cuda.move_graph
    monkeypatch.setattr(
        cuda, "move_graph", lambda graph, device: (onto(graph, torch.device("meta")), moved.append(device))[0]
    )
    monkeypatch.setattr(aoti, "compile_graph", compiled)
    monkeypatch.setattr(aoti, "write_package", lambda path, models: written.update({path.name: models}))
    config = recipe(ON_GPU, "compile.options.tf32=false").compile
    paths = aoti.lower(tmp_path, {"denoiser": [graph]}, config, lambda component, graph, compiled: compiled(graph))
    assert paths == {"made": "graphs/denoiser.pt2"}
    assert written == {"denoiser.pt2": {"made": {"model.so": b""}}}
    assert moved == [torch.device("cuda"), ("meta", aoti.compile_flags(config), "highest")]


# --- weights to the device -----------------------------------------------------------------------------------------------


class LateLane:
    """What is sent arrives only when it is waited for, and with `waits` False not even then: at the very end."""

    def __init__(self, waits: bool = True) -> None:
        self.waits, self.under_way, self.buffers, self.most = waits, [], 0, 0

    def buffer(self, count: int) -> Tensor:
        self.buffers += 1
        return torch.empty(count, dtype=torch.uint8)

    def send(self, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        ticket = (target, source)
        self.under_way.append(ticket)
        self.most = max(self.most, len(self.under_way))
        return ticket

    def wait(self, ticket: tuple[Tensor, Tensor]) -> None:
        if self.waits:
            target, source = ticket
            target.copy_(source)
            self.under_way = [t for t in self.under_way if t is not ticket]

    def close(self) -> None:
        for target, source in self.under_way:
            target.copy_(source)


WEIGHTS = {
    "whole": torch.arange(1000, dtype=torch.float32).reshape(10, 100),
    "scalar": torch.tensor(7.0),
    "half": torch.arange(130, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "bytes": torch.arange(100, dtype=torch.int8).to(torch.float8_e4m3fn),
    "mask": torch.tensor([True, False, True]),
}


def sent(lane: LateLane) -> bool:
    there = upload_tensors(WEIGHTS, torch.device("cpu"), lane, piece_bytes=256)
    lane.close()
    assert there.keys() == WEIGHTS.keys()
    assert all(there[k].dtype == t.dtype and there[k].shape == t.shape for k, t in WEIGHTS.items())
    raw = [(t.reshape(-1).view(torch.uint8), there[k].reshape(-1).view(torch.uint8)) for k, t in WEIGHTS.items()]
    return all(torch.equal(a, b) for a, b in raw)


def test_no_buffer_is_filled_again_before_it_has_arrived():
    lane = LateLane()
    assert sent(lane)
    assert (lane.buffers, lane.most) == (BUFFER_COUNT, BUFFER_COUNT)  # one is filled while the other travels
    assert not sent(LateLane(waits=False))  # the canary


# --- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "int8_dynamic"])
def test_an_export_for_this_gpu_is_verified_on_it(tmp_path, method):
    from prebake.exporter.pipeline import ExportOptions, export
    from prebake.exporter.progress import open_progress
    from prebake.runtime import load

    asked = recipe(
        ON_GPU, f"quantize.method={method}", "cache.method=pab", "verify.cached_psnr_db=20", "verify.seeds=1"
    )
    with open_progress("quiet") as quiet:
        export(asked, tmp_path / "artifact", ExportOptions(), quiet)
    pipe = load(tmp_path / "artifact")
    assert {t.device.type for t in pipe.artifact.weights.values()} == {"cuda"}
    assert pipe("a circle", seed=0).images[0].size == (32, 32)
