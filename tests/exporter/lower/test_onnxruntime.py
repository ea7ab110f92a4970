"""ONNX Runtime: what runs is what was asked for, over memory that is shared, and what cannot run is refused."""

from __future__ import annotations

import importlib
import json
import re
import threading
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.family_parity import FAMILIES, FLOAT32, PLAIN, PROMPTS, exact_int8, expected, relative_error, seeded
from support.paths import ROOT

onnxruntime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'prebake[ort]'")
onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'prebake[export]'")

from prebake.exporter.capture.capture import capture_graph  # noqa: E402
from prebake.exporter.lower import aoti, w8a8  # noqa: E402
from prebake.exporter.lower import onnxruntime as lowering  # noqa: E402
from prebake.exporter.lower.onnx.graph import embed_data, onnx_model  # noqa: E402
from prebake.exporter.lower.onnx.rewrite import rewrite_graph  # noqa: E402
from prebake.exporter.pipeline import ExportOptions, export  # noqa: E402
from prebake.exporter.progress import open_progress  # noqa: E402
from prebake.exporter.quantize import Int8Dynamic  # noqa: E402
from prebake.exporter.recipe.resolve import resolve  # noqa: E402
from prebake.runtime import load  # noqa: E402
from prebake.runtime.artifact import open_artifact, open_graphs  # noqa: E402
from prebake.runtime.backends import onnxruntime as opening  # noqa: E402
from prebake.runtime.check.artifact import check_artifact  # noqa: E402
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError  # noqa: E402
from prebake.runtime.manifest import read_manifest  # noqa: E402

BACKEND = "compile.backend=onnxruntime"
INT8 = (*FLOAT32, "cache.method=none", "quantize.method=int8_dynamic", "quantize.min_width_ratio=0", BACKEND)
LIMIT = 1e-4
"""On latents, relative in L2: float32 sums in another order, over all steps. Seen are 2e-7 to 2e-6."""
CPU = torch.device("cpu")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DECLARED = PYPROJECT["project"]["optional-dependencies"]
END = DECLARED["ort"][0].partition("<")[2]
"""The first version that was not tried."""


def exported(folder: Path, recipe: str, overrides: tuple[str, ...], tiny: str) -> Path:
    with open_progress("quiet") as quiet:
        return export(
            resolve(recipe, overrides, f"tiny:{tiny}"), folder / "artifact", ExportOptions(verify=False), quiet
        )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """The tiny FLUX in int8."""
    return exported(tmp_path_factory.mktemp("onnxruntime"), "flux-fast", INT8, "flux")


@pytest.fixture(scope="module")
def manifest(artifact) -> dict[str, Any]:
    return json.loads((artifact / "manifest.json").read_text("utf-8"))


# --- memory ---------------------------------------------------------------------------------------------------------


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.on = nn.Parameter(torch.ones(64, 64)), nn.Buffer(torch.tensor([True] * 64))

    def forward(self, x):
        return (torch.where(self.on, x @ self.weight, x),)


def session_of(folder: Path, *, prepack: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    """A session of `Product`, and its constants, which are the session's own memory."""
    from safetensors.torch import save_file

    from prebake.exporter.lower.onnx.graph import find_weight_data, locate_data

    graph = capture_graph("g", Product(), (torch.ones(3, 64),), ("x",), ("y",))
    constants = {name: tensor.detach().clone() for name, tensor in graph.constants().items()}
    (folder / "weights").mkdir()
    save_file(constants, folder / "weights" / "g.safetensors")
    model = onnx_model(graph)
    locate_data(model, find_weight_data(folder))
    values = {name: opening.ort_value(tensor) for name, tensor in constants.items()}
    return (opening.open_session(model.SerializeToString(), folder, values, CPU, 1, prepack=prepack), values), constants


def test_a_session_reads_the_tensors_it_was_given_and_no_copy_of_them(tmp_path):
    (session, _), constants = session_of(tmp_path)
    x = {"x": np.ones((3, 64), np.float32)}
    assert session.run(None, x)[0][0, 0] == 64
    constants["weight"].fill_(2)
    assert session.run(None, x)[0][0, 0] == 128
    constants["on"].fill_(False)
    assert session.run(None, x)[0][0, 0] == 1


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        (torch.bool, "bool"),
        (torch.uint8, "uint8"),
        (torch.int8, "int8"),
        (torch.int64, "int64"),
        (torch.float16, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float32, "float"),
    ],
)
def test_a_tensor_keeps_its_dtype_and_its_memory(dtype, named):
    """Of booleans ONNX Runtime 1.32 wants something else than 1.31, and calls what that wanted uint8."""
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    value = opening.ort_value(tensor)
    assert (value.data_type(), value.data_ptr()) == (f"tensor({named})", tensor.data_ptr())


class Chosen(nn.Module):
    """Booleans as an input, as a constant and as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.on = nn.Buffer(torch.tensor([True, True, False, False]))

    def forward(self, mask, x):
        both = mask & self.on
        return both, torch.where(both, x, 0.0)


def test_booleans_go_in_and_come_out(tmp_path):
    from safetensors.torch import save_file

    from prebake.exporter.lower.onnx.graph import find_weight_data, locate_data
    from prebake.runtime.manifest import Graph, TensorSpec

    mask, x = torch.tensor([True, False, True, False]), torch.ones(4)
    captured = capture_graph("g", Chosen(), (mask, x), ("mask", "x"), ("both", "y"))
    constants = {name: tensor.detach().clone() for name, tensor in captured.constants().items()}
    (tmp_path / "weights").mkdir()
    save_file(constants, tmp_path / "weights" / "g.safetensors")
    model = onnx_model(captured)
    locate_data(model, find_weight_data(tmp_path))
    values = {name: opening.ort_value(tensor) for name, tensor in constants.items()}
    session = opening.open_session(model.SerializeToString(), tmp_path, values, CPU, 1, prepack=False)
    graph = Graph.model_construct(
        name="g",
        inputs=(TensorSpec(name="mask", shape=(4,), dtype="bool"), TensorSpec(name="x", shape=(4,), dtype="float32")),
        outputs=(TensorSpec(name="both", shape=(4,), dtype="bool"), TensorSpec(name="y", shape=(4,), dtype="float32")),
    )
    both, y = opening.SessionModel(graph, session, values, CPU)([mask, x])
    assert both.tolist() == [True, False, False, False]
    assert y.tolist() == [1, 0, 0, 0]


class Folded(nn.Module):
    """What is computed of constants alone is computed by the optimizer, before any kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x):
        return (x * (self.scale + 1),)


@pytest.mark.parametrize("by_name", [False, True])
def test_weights_that_are_replaced_after_the_check_are_not_read(tmp_path, by_name):
    """And would be, had the optimizer only the name of their file."""
    from safetensors.torch import save_file

    from prebake.exporter.lower.onnx.graph import find_weight_data, locate_data

    graph = capture_graph("g", Folded(), (torch.ones(4),), ("x",), ("y",))
    constants = {name: tensor.detach().clone() for name, tensor in graph.constants().items()}
    (tmp_path / "weights").mkdir()
    save_file(constants, tmp_path / "weights/g.safetensors")
    model = onnx_model(graph)
    locate_data(model, find_weight_data(tmp_path))
    values = {name: opening.ort_value(tensor) for name, tensor in constants.items()}
    save_file(
        {name: torch.full_like(tensor, 8.0) for name, tensor in constants.items()}, tmp_path / "weights/g.safetensors"
    )
    if by_name:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    else:
        session = opening.open_session(model.SerializeToString(), tmp_path, values, CPU, 1, prepack=True)
    assert session.run(None, {"x": np.ones(4, np.float32)})[0].tolist() == [9.0 if by_name else 3.0] * 4


def test_prepacking_keeps_a_copy(tmp_path):
    """Why variants of a denoiser do not, by default: each would hold the same weights once more."""
    (session, _), constants = session_of(tmp_path, prepack=True)
    constants["weight"].fill_(2)
    assert session.run(None, {"x": np.ones((3, 64), np.float32)})[0][0, 0] == 64


def test_sessions_prepack_by_default_unless_several_would_hold_the_same_weights(artifact):
    one = read_manifest(artifact)
    full = one.graph("full")
    two = one.model_copy(update={"graphs": (*one.graphs, full.model_copy(update={"name": "cached"}))})
    others = {"text_encoder", "vae_decoder"}
    assert opening.graphs_to_prepack(one, None) == others | {"full"}
    assert opening.graphs_to_prepack(two, None) == others
    assert opening.graphs_to_prepack(two, True) == others | {"full", "cached"}
    assert opening.graphs_to_prepack(one, False) == set()


def test_prepacking_is_what_the_session_is_opened_with(artifact, monkeypatch):
    seen = []
    open_session = opening.open_session
    monkeypatch.setattr(
        opening, "open_session", lambda *args, prepack: seen.append(prepack) or open_session(*args, prepack=prepack)
    )
    for packs in (set(), {"full"}):
        monkeypatch.setattr(opening, "graphs_to_prepack", lambda manifest, asked, packs=packs: packs)
        open_artifact(artifact)
    names = [graph.name for graph in read_manifest(artifact).graphs]
    assert seen == [False] * len(names) + [name == "full" for name in names]


def test_outputs_are_fresh_at_every_call(artifact):
    decoder = open_artifact(artifact).graph("vae_decoder")
    x = {s.name: torch.randn(s.shape) for s in decoder.graph.inputs}
    first = decoder(x)["image"]
    kept = first.clone()
    other = decoder({name: -tensor for name, tensor in x.items()})["image"]
    assert torch.equal(first, kept)
    assert not torch.equal(other, first)
    assert torch.equal(decoder(x)["image"], kept)


def test_threads_may_call_one_artifact_at_once(artifact):
    pipe = load(artifact)
    alone = [pipe(PROMPTS[0], seed=s, output_type="latent")[0] for s in range(3)]
    drawn: dict[int, torch.Tensor] = {}

    def draw(seed: int) -> None:
        drawn[seed] = pipe(PROMPTS[0], seed=seed, output_type="latent")[0]

    threads = [threading.Thread(target=draw, args=(s,)) for s in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(drawn[s], alone[s]) for s in range(3))


# --- what is in the artifact ----------------------------------------------------------------------------------------


def test_graphs_say_where_their_weights_lie(artifact, manifest):
    """With that, any ONNX tool can read them: here onnx itself."""
    opened = open_artifact(artifact)
    for graph in manifest["graphs"]:
        model = onnx.load(artifact / graph["package"], load_external_data=False)
        onnx.load_external_data_for_model(model, str(artifact))
        read = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        assert read.keys() == graph["constants"].keys()
        for name, key in graph["constants"].items():
            assert np.array_equal(read[name], opened.weights[key].numpy()), name


def test_every_int8_product_runs_as_one(artifact, manifest, tmp_path):
    quantized = [name for name, (what, _) in manifest["layers"].items() if what == "int8"]
    assert len(quantized) > 10
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(artifact))
    data = (artifact / "graphs" / "full.onnx").read_bytes()
    onnxruntime.InferenceSession(
        data, options, ["CPUExecutionProvider"], disabled_optimizers=[opening.MERGING_OPTIMIZER]
    )
    ran = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node)
    written = Counter(n.op_type for n in onnx.load_from_string(data).graph.node)
    assert ran["MatMulIntegerToFloat"] == written["QuantizeLinear"] == len(quantized)
    assert ran["DequantizeLinear"] == 0


def test_a_root_mean_square_is_one_kernel(tmp_path):
    graph = rewrite_graph(capture_graph("g", nn.RMSNorm(8, eps=1e-6), (torch.ones(3, 8),), ("x",), ("y",)))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    data = embed_data(onnx_model(graph), graph.constants()).SerializeToString()
    onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    assert [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["SimplifiedLayerNormalization"]


@exact_int8
def test_a_session_gives_what_the_int8_operator_gives(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 128))
    w8a8.replace_layers(module, {"0"}, Int8Dynamic())
    x = torch.randn(3, 7, 256)
    graph = rewrite_graph(capture_graph("g", module, (x,), ("x",), ("y",)))
    data = embed_data(onnx_model(graph), graph.constants()).SerializeToString()
    session = onnxruntime.InferenceSession(
        data, providers=["CPUExecutionProvider"], disabled_optimizers=[opening.MERGING_OPTIMIZER]
    )
    got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert relative_error(got, module(x)) < 1e-6  # the same integers; their product is scaled in another order


def test_it_requires_this_version_or_a_newer_one_and_any_torch(manifest):
    requires = manifest["requires"]
    assert requires["packages"] == {"onnxruntime": onnxruntime.__version__}
    assert requires["torch"] is None


# --- what is refused ------------------------------------------------------------------------------------------------


def lacking(manifest: dict[str, Any], **changes: Any) -> list[str]:
    from prebake.runtime.manifest import Requires

    return list(opening.problems(Requires(**(manifest["requires"] | changes))))


def test_an_older_onnxruntime_is_a_problem_and_a_newer_one_none(manifest, declared_extras):
    assert lacking(manifest) == []
    assert lacking(manifest, packages={"onnxruntime": "1.2.0"}) == []
    (problem,) = lacking(manifest, packages={"onnxruntime": f"{END}.0"})
    assert problem == (
        f"was exported with onnxruntime {END}.0, this is {onnxruntime.__version__}; "
        f"use a newer prebake: this one was tried with versions before {END}"
    )


def test_the_way_to_a_newer_onnxruntime_ends_where_it_was_tried(manifest, declared_extras, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.0")
    (problem,) = lacking(manifest, packages={"onnxruntime": "1.31.1"})
    assert problem.endswith(f"; pip install 'onnxruntime>=1.31.1,<{END}', or export again")


@pytest.mark.parametrize("version", [END, f"{END}.0", f"{END}.1", "99.0"])
def test_an_onnxruntime_that_was_never_tried_is_a_problem(manifest, declared_extras, monkeypatch, version):
    """What it changed could show when a session is opened, and no earlier: an artifact that passes `check` opens."""
    monkeypatch.setattr(onnxruntime, "__version__", version)
    said = (
        f"this is onnxruntime {version}, and this prebake was tried with versions before {END}; pip install 'prebake["
    )
    (problem,) = lacking(manifest)
    assert problem.startswith(said)
    with pytest.raises(ExportError, match=re.escape(said)):  # before anything is loaded or compiled
        lowering.adapt_recipe(resolve("baseline", (BACKEND,), "tiny:flux"))


def test_check_and_load_say_the_same_of_it(artifact, declared_extras, monkeypatch, capsys):
    check_artifact(artifact, read_manifest(artifact))
    monkeypatch.setattr(onnxruntime, "__version__", END)
    said = f"this is onnxruntime {END}, "
    with pytest.raises(ArtifactError, match=said):
        check_artifact(artifact, read_manifest(artifact))
    with pytest.raises(ArtifactError, match=said):
        load(artifact)


def test_both_builds_have_one_range():
    assert DECLARED["ort-gpu"] == [line.replace("onnxruntime", "onnxruntime-gpu") for line in DECLARED["ort"]]


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this one has CUDA")
def test_a_provider_that_is_not_there_is_a_problem_and_never_another_one(manifest, declared_extras):
    (problem,) = lacking(manifest, device="cuda")
    assert problem.startswith("runs on CUDAExecutionProvider, this onnxruntime has ")
    assert problem.endswith("; pip uninstall onnxruntime, then pip install 'prebake[ort-gpu]'; or export for the cpu")


def test_a_session_on_another_provider_is_refused(artifact, monkeypatch):
    class Elsewhere:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(opening.onnxruntime, "InferenceSession", lambda *_, **__: Elsewhere())
    with pytest.raises(ArtifactError, match=r"run on CPU.*, not on CUDAExecutionProvider"):
        opening.open_session(b"", artifact, {}, torch.device("cuda"), 1, prepack=False)


def test_bytes_that_were_not_checked_are_not_opened(artifact):
    opened = open_artifact(artifact)
    file = artifact / "graphs" / "vae_decoder.onnx"
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1] + b"\0")
        with pytest.raises(ArtifactError, match=r"graphs/vae_decoder\.onnx: sha256 is .*export again"):
            open_graphs(artifact, opened.manifest, opened.weights, CPU, None)
    finally:
        file.write_bytes(data)


def test_a_file_of_other_inputs_is_refused(artifact):
    opened = open_artifact(artifact)
    graph = opened.manifest.graph("vae_decoder")
    session = opened.graphs["full"]._model._session
    with pytest.raises(ArtifactError, match=r"'vae_decoder': its file takes .* not what the manifest says"):
        opening.SessionModel(graph, session, {}, CPU)


def test_bfloat16_becomes_float32_on_the_cpu_and_is_said():
    recipe = resolve("flux-fast", ("precision.denoiser=float32", BACKEND), "tiny:flux")
    adapted, said = lowering.adapt_recipe(recipe)
    assert said == ("precision.text_encoders, precision.vae: float32, since ONNX Runtime has no bfloat16 on the CPU",)
    assert set(dict(adapted.precision).values()) == {"float32"}
    assert adapted == recipe.model_copy(update={"precision": adapted.precision})
    assert lowering.adapt_recipe(adapted) == (adapted, ())
    on_gpu = resolve("flux-fast", (BACKEND, "compile.device=cuda"), "tiny:flux")
    assert lowering.adapt_recipe(on_gpu) == (on_gpu, ())


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("prepak=true", r"compile\.options \[prepak\].*options of this backend: opset, prepack"),
        ("prepack=1", r"compile\.options \[prepack\].*valid boolean"),
    ],
)
def test_options_that_there_are_not(option, problem):
    with pytest.raises(RecipeError, match=problem):
        lowering.adapt_recipe(resolve("flux-fast", (BACKEND, f"compile.options.{option}"), "tiny:flux"))


@pytest.mark.parametrize("backend", ["onnxruntime", "aoti"])
def test_fp8_is_refused_where_nothing_multiplies_it(backend):
    recipe = resolve("flux-fast", (f"compile.backend={backend}", "quantize.method=fp8_dynamic"), "tiny:flux")
    with pytest.raises(RecipeError, match=r"method 'fp8_dynamic': .*int8_dynamic, or .*tensorrt$"):
        importlib.import_module(f"prebake.exporter.lower.{backend}").adapt_recipe(recipe)


def test_aoti_has_other_options():
    recipe = resolve("flux-fast", ("compile.backend=aoti", "compile.options.prepack=true"), "tiny:flux")
    with pytest.raises(RecipeError, match=r"\[prepack\].*options of this backend: kernels"):
        aoti.adapt_recipe(recipe)


# --- families -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_draws_what_diffusers_draws(name, tmp_path):
    case = FAMILIES[name]
    pipe = load(exported(tmp_path, case.recipe, (*PLAIN, *case.overrides, BACKEND), case.tiny))
    latents = expected(name, PROMPTS[0], generator=seeded(1))
    drawn = [pipe(PROMPTS[0], seed=s, output_type="latent", **case.ours)[0] for s in (1, 2)]
    assert relative_error(drawn[0], latents) < LIMIT
    assert relative_error(drawn[1], latents) > 0.1  # the canary: another noise
