"""Engines that TensorRT-RTX builds here, without a GPU: what goes in is right, what comes out is what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.cli.main import main
from prebake.exporter.lower import w8a8
from prebake.exporter.passes.captured_graph import CapturedGraph, run_passes
from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.progress import Progress
from prebake.exporter.quantize import Fp8Dynamic
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime import load
from prebake.runtime.backends.tensorrt import weight_view
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError
from support.captured_pipeline import captured, prepared
from support.family_parity import FLOAT32

trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'prebake[ort]'")
lowering: Any = pytest.importorskip("prebake.exporter.lower.tensorrt")

BACKEND = ("compile.backend=tensorrt", "compile.device=cuda")
BFLOAT16 = tuple(setting.replace("float32", "bfloat16") for setting in FLOAT32)
CLOSE = 1e-5
"""Relative in L2: the same float32 sums in another order. Seen are 1e-7 to 2e-6."""
CLOSE_INT8 = 5e-3
"""The same with int8: a value that is rounded to the other neighbour changes its product by one part in 127. Seen is 1.5e-3, for
the largest value of each token lies half way between two integers."""
CLOSE_FP8 = 1e-3
"""The same with fp8. Seen is 3e-7, with no value rounded elsewhere: the room is for a few on another CPU, by one part in 8."""


class Notes(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, list[str]]:
    recipe = resolve("flux-fast", (*BACKEND, "quantize.method=int8_dynamic"), "tiny:flux")
    notes = Notes()
    return export(recipe, tmp_path_factory.mktemp("tensorrt") / "artifact", ExportOptions(), notes), notes.notes


@pytest.fixture(scope="module")
def artifact(exported) -> Path:
    return exported[0]


@pytest.fixture(scope="module")
def manifest(artifact) -> dict[str, Any]:
    return json.loads((artifact / "manifest.json").read_text("utf-8"))


def layers_of(artifact: Path, graph: str) -> list[dict[str, Any]]:
    return json.loads((artifact / "reports" / "engines" / f"{graph}.json").read_text("utf-8"))


def gemms(layers: list[dict[str, Any]], dtype: str) -> int:
    """Products of two tensors of TensorRT's `dtype`."""
    return sum(x["type"] == "gemm" and [t["dtype"] for t in x["inputs"][:2]] == [dtype] * 2 for x in layers)


def fused_attentions(layers: list[dict[str, Any]]) -> int:
    return sum(x["name"].startswith("_gemm_mha") for x in layers)


def moved_weights(layers: list[dict[str, Any]], graph: CapturedGraph) -> list[str]:
    """Weights of matrices and convolutions that some layer does nothing with but lay them out anew."""
    large = {name for name, tensor in graph.constants().items() if tensor.dim() > 1 and tensor.numel() >= 1024}
    return [t["name"] for x in layers if x["name"].startswith("__myl_Move") for t in x["inputs"] if t["name"] in large]


def calls(graph: CapturedGraph, operator: Any) -> int:
    return len(graph.gm.graph.find_nodes(op="call_function", target=operator))


SDPA = torch.ops.aten.scaled_dot_product_attention.default

# --- the artifact ----------------------------------------------------------------------------------------------------


def test_it_is_written_unverified_where_it_cannot_run(exported, manifest):
    _, notes = exported
    assert (manifest["backend"], manifest["status"]) == ("tensorrt", "unverified")
    assert [n for n in notes if "not verified" in n and "sees no GPU" in n]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_refuses_it_in_a_sentence(artifact):
    with pytest.raises(ArtifactError, match="was compiled for cuda, this torch sees no GPU") as raised:
        load(artifact)
    assert len(str(raised.value).splitlines()) == 1


def test_inspect_says_what_it_needs(artifact, capsys):
    assert main(["inspect", str(artifact)]) == 0
    out = " ".join(capsys.readouterr().out.split())  # its lines are broken at 80 columns
    needs = out.partition(" needs ")[2].partition(" defaults ")[0]
    assert f"cuda, any, compute_capability sm80 sm86 sm89 sm120, cuda 13, tensorrt_rtx {trt.__version__}" in needs
    assert "None" not in needs


def test_the_builders_settings_are_in_the_manifest(manifest):
    chosen = {name: value for name, value in manifest["toolchain"].items() if name.startswith("tensorrt.")}
    assert chosen == {
        "tensorrt.flavour": "rtx",
        "tensorrt.compute_capabilities": "sm80 sm86 sm89 sm120",
        "tensorrt.workspace_mib": "0",
        "tensorrt.optimization_level": "3",
        "tensorrt.opset": "21",
        "tensorrt.network": "strongly typed",
    }


def test_every_quantized_linear_is_a_product_of_int8(artifact, manifest):
    quantized = sum(treatment == "int8" for treatment, _ in manifest["layers"].values())
    assert quantized > 0
    assert gemms(layers_of(artifact, "full"), "Int8") == quantized
    assert gemms(layers_of(artifact, "text_encoder"), "Int8") == 0  # the canary


def test_every_attention_of_the_denoiser_is_one_fused_kernel(artifact):
    recipe = resolve("flux-fast", ("quantize.method=none", "cache.method=none"), "tiny:flux")
    wanted = calls(captured(prepared(recipe))["full"], SDPA)
    assert wanted > 0
    assert fused_attentions(layers_of(artifact, "full")) == wanted


def test_no_engine_holds_a_weight(artifact, manifest):
    """None of the larger tensors' bytes are in the code, and all of their names are."""
    from safetensors.torch import load_file

    weights = load_file(artifact / "weights" / "denoiser.safetensors")
    (full,) = [graph for graph in manifest["graphs"] if graph["name"] == "full"]
    code = (artifact / full["package"]).read_bytes()
    large = {name: key for name, key in full["constants"].items() if weights[key].unique().numel() >= 200}
    assert len(large) > 10
    for name, key in large.items():
        data = weights[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[:256] not in code
        assert data[-256:] not in code
        assert name.encode() in code


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "names", "room"),
    [
        ("none", ("full", "text_encoder", "vae_decoder"), CLOSE),
        pytest.param("int8_dynamic", ("full",), CLOSE_INT8, marks=pytest.mark.slow),
        pytest.param("fp8_dynamic", ("full",), CLOSE_FP8, marks=pytest.mark.slow),
    ],
)
def test_what_the_parser_gets_computes_what_the_graph_does(method, names, room):
    """By ONNX Runtime, with every constant as an input."""
    recipe = resolve("flux-fast", (*BACKEND, *FLOAT32, f"quantize.method={method}", "cache.method=none"), "tiny:flux")
    graphs = captured(prepared(recipe))
    passes = lowering.list_passes(None)
    for graph in (run_passes(graphs[name], passes) for name in names):
        got, wanted = run(graph, graph.constants()), graph.gm(*graph.args)
        assert error(got, wanted) < room
        weights = {name: tensor.detach().clone() for name, tensor in graph.constants().items()}
        largest = max((t for t in weights.values() if t.is_floating_point()), key=lambda t: t.numel())
        largest += torch.randn_like(largest) * largest.std()  # the canary
        assert error(run(graph, weights), wanted) > 5 * room


def run(graph: CapturedGraph, constants: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # it would take products of fp8 for such of int8
    model = lowering.build_network(graph).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = dict(zip([s.name for s in graph.inputs], graph.args, strict=True)) | constants
    shapes = {i.name: tuple(i.shape) for i in session.get_inputs()}
    values = {n: value_of(weight_view(t.detach(), shapes[n]).contiguous()) for n, t in feeds.items() if n in shapes}
    return [torch.from_numpy(np.asarray(value.numpy())) for value in session.run_with_ort_values(None, values)]


def value_of(tensor: torch.Tensor) -> Any:
    """The tensor's memory; numpy has no fp8."""
    from onnxruntime import OrtValue

    if tensor.dtype is not torch.float8_e4m3fn:
        return OrtValue.ortvalue_from_numpy(tensor.numpy())
    return OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint8).numpy(), TensorProto.FLOAT8E4M3FN)


def error(got: list[torch.Tensor], wanted: Any) -> float:
    pairs = [(a.double(), b.detach().double()) for a, b in zip(got, wanted, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def test_a_unet_is_built_with_its_attention_fused_and_its_weights_read_where_they_lie():
    recipe = resolve("sd-fast", (*BACKEND, *BFLOAT16, "cache.method=none", "quantize.method=none"), "tiny:sd")
    graph = captured(prepared(recipe))["full"]
    graph = run_passes(graph, lowering.list_passes(None))
    engine, layers = lowering.build_engine(trt, graph, lowering.read_options(recipe.compile, lowering.TensorRTOptions))
    assert engine
    heads = [node.args[0].meta["val"].shape[-1] for node in graph.gm.graph.find_nodes(op="call_function", target=SDPA)]
    assert sorted(set(heads)) == [
        8,
        16,
    ]  # the library has no fused kernel for heads of 8, of which no real model has any
    assert fused_attentions(layers) == heads.count(16) > 0
    assert moved_weights(layers, graph) == []


def test_opset_23_and_fp8_give_one_fused_kernel_for_each_attention_and_products_of_fp8():
    settings = ("compile.options.opset=23", "quantize.method=fp8_dynamic", "cache.method=none")
    made = prepared(resolve("flux-fast", (*BACKEND, *BFLOAT16, *settings), "tiny:flux"))
    graph = run_passes(captured(made)["full"], lowering.list_passes(None))
    attentions, quantized = calls(graph, SDPA), sum(what == "fp8" for what, _ in made.layers.values())
    written = [node.op_type for node in lowering.build_network(graph, 23).graph.node]
    assert written.count("Attention") == attentions > 0
    assert "Attention" not in [node.op_type for node in lowering.build_network(graph).graph.node]
    _, layers = lowering.build_engine(trt, graph, lowering.read_options(made.recipe.compile, lowering.TensorRTOptions))
    assert fused_attentions(layers) == attentions
    assert gemms(layers, "FP8") == quantized > 0
    assert gemms(layers, "Int8") == 0  # the canary


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (nn.functional.scaled_dot_product_attention(x, x * 2, x + 1),)


def test_attention_without_a_fused_kernel_is_taken_apart():
    """In float32 there is none: an operator that may not be taken apart fails."""
    graph = run_passes(
        capture_graph("attention", Attention(), (torch.ones(1, 2, 16, 16),), ("x",), ("y",)), lowering.list_passes(None)
    )
    model, chosen = lowering.build_network(graph, 23), options()
    _, layers = lowering.build_model_engine(trt, "attention", model, chosen)
    assert fused_attentions(layers) == 0
    (node,) = [node for node in model.graph.node if node.op_type == "Attention"]
    (mark,) = [a for a in node.attribute if a.name == "TRT_decomposable"]
    node.attribute.remove(mark)
    with pytest.raises(ExportError, match=r"Attention operation was not supported by a dedicated kernel"):
        lowering.build_model_engine(trt, "attention", model, chosen)


# --- options and refusals --------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.bitwise_left_shift(x, 2),)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x @ self.weight,)


def options(*settings: str) -> Any:
    return lowering.read_options(
        resolve("flux-fast", (*BACKEND, *settings), "tiny:flux").compile, lowering.TensorRTOptions
    )


def test_what_the_library_cannot_build_is_named():
    graph = capture_graph("shifted", Shifted(), (torch.ones(2, 3, dtype=torch.int32),), ("x",), ("y",))
    with pytest.raises(ExportError, match=r"'shifted': .*initializer.*set compile\.backend"):
        lowering.build_engine(trt, graph, options())


def test_the_same_graph_gives_the_same_bytes_and_other_gpus_give_others():
    graph = capture_graph("product", Product(), (torch.ones(4, 16),), ("x",), ("y",))
    one = "compile.options.compute_capabilities=sm89"
    first, second, third = (lowering.build_engine(trt, graph, options(*more))[0] for more in ((), (), (one,)))
    assert first == second
    assert first != third


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("compile.options.flavor=rtx", r"compile\.options \[flavor\].*options of this backend: opset, flavour, "),
        ("compile.options.optimization_level=6", r"compile\.options \[optimization_level\]"),
        ("compile.options.compute_capabilities=8.9", r"compile\.options \[compute_capabilities\]"),
    ],
)
def test_an_option_that_there_is_not_is_refused(setting, said):
    with pytest.raises(RecipeError, match=said):
        options(setting)


def test_engines_are_for_gpus_whatever_the_recipe_says():
    recipe = resolve("flux-fast", ("compile.backend=tensorrt",), "tiny:flux")
    adapted, said = lowering.adapt_recipe(recipe)
    assert said == ("compile.device is cuda: engines of TensorRT run on GPUs",)
    assert adapted == resolve("flux-fast", ("compile.backend=tensorrt", "compile.device=cuda"), "tiny:flux")
    assert lowering.adapt_recipe(adapted) == (adapted, ())


def fp8(*settings: str) -> Any:
    return resolve("flux-fast", (*BACKEND, "quantize.method=fp8_dynamic", *settings), "tiny:flux")


def test_fp8_is_for_gpus_that_multiply_it():
    adapted, (said,) = lowering.adapt_recipe(fp8())
    assert adapted.compile.options == {"compute_capabilities": "sm89 sm120"}
    assert said == "compile.options.compute_capabilities is sm89 sm120: GPUs multiply fp8 from sm89 on"
    assert lowering.adapt_recipe(adapted) == (adapted, ())
    other = fp8("compile.options.flavour=tensorrt")  # which builds for the GPU that it is on
    assert lowering.adapt_recipe(other) == (other, ())
    with pytest.raises(RecipeError, match=r"fp8 from sm89 on, got 'sm80'.*quantize\.method=int8"):
        lowering.adapt_recipe(fp8("compile.options.compute_capabilities=sm80 sm89"))


def test_the_library_builds_no_fp8_for_older_gpus():
    """Why the recipe is adapted."""
    module = nn.Sequential(nn.Linear(64, 64))
    w8a8.replace_layers(module, {"0"}, Fp8Dynamic())
    graph = run_passes(
        capture_graph("product", module, (torch.ones(16, 64),), ("x",), ("y",)), lowering.list_passes(None)
    )
    with pytest.raises(ExportError, match=r"Cannot compile for target\(s\) sm80, sm86, .*fp8"):
        lowering.build_engine(trt, graph, options())
    assert lowering.build_engine(trt, graph, options("compile.options.compute_capabilities=sm89"))


class Configuration:
    """A builder's, as far as what it measured goes: that is bytes which are for a GPU."""

    def __init__(self, gpu: str) -> None:
        self.gpu, self.timings = gpu, b""

    def create_timing_cache(self, measured: bytes) -> bytes:
        return measured or b"empty"

    def set_timing_cache(self, timings: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        fits = timings == b"empty" or timings.decode() == self.gpu
        self.timings = timings if fits else b""
        return fits


def test_what_the_other_flavour_measured_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    place = lowering.timing_cache_name(trt)
    for kept, gpu, given in ((b"", "one", b"empty"), (b"one", "one", b"one"), (b"one", "two", b"empty")):
        if kept:
            lowering.write_private(None, place, kept)
        lowering.load_timing_cache(trt, configuration := Configuration(gpu))
        assert configuration.timings == given


def test_a_gpu_that_the_library_has_no_kernels_for_is_refused():
    graph = capture_graph("product", Product(), (torch.ones(4, 16),), ("x",), ("y",))
    with pytest.raises(RecipeError, match=r"builds for sm75, sm80, .*sm121, got 'sm90'"):
        lowering.build_engine(trt, graph, options("compile.options.compute_capabilities=sm89 sm90"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_other_flavour_wants_to_be_installed_or_a_gpu():
    with pytest.raises(ExportError, match=r"'prebake\[trt\]'|set compile\.options\.flavour=rtx"):
        lowering.import_library(options("compile.options.flavour=tensorrt"))
