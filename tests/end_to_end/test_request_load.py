"""A thousand mixed requests on a real export, and what a second process costs. What takes minutes is marked slow."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # last, since its modules have short names
import memory
import soak

from prebake.runtime import load
from prebake.runtime.manifest import read_manifest
from support import toy_model as toy

MIB = 1 << 20
WEIGHTS = 128 * MIB
"""So much that a tenth of it is more than what processes differ by."""

OPENS = """
import sys, torch
from prebake.runtime.artifact import open_artifact
torch.set_num_threads(1)
if sys.argv[4]:
    __import__(sys.argv[4])
if sys.argv[1]:
    graph = open_artifact(sys.argv[1], cache_dir=sys.argv[2]).graphs["full"]
    held = graph({"x": torch.ones(1, 4096)})
    if sys.argv[3]:
        copies = [torch.rand(4 << 20) for _ in range(2)]
print("ready", flush=True)
sys.stdin.read()
"""


class Wide(torch.nn.Module):
    """Two layers of 64 MiB each."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def with_aoti(folder, wide, x):
    toy.compile_package(folder / "graphs/denoiser.pt2", {"full": (wide, (x,))})
    return "graphs/denoiser.pt2", {name: name for name in wide.state_dict()}, toy.requires(), "aoti"


def with_onnxruntime(folder, wide, x):
    """The graph by hand: the exporter's would be of a whole pipeline."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'prebake[export]'")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'prebake[ort]'")
    helper, names = onnx.helper, [name.replace(".", "_") for name in wide.state_dict()]
    nodes = [
        helper.make_node("Gemm", [a, name, ""], [b], transB=1)
        for a, name, b in zip(("x", "h"), names, ("h", "y"), strict=True)
    ]
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4096]) for n in "xy"]
    tensors = [
        onnx.TensorProto(name=n, data_type=1, dims=[4096, 4096], data_location=onnx.TensorProto.EXTERNAL) for n in names
    ]
    for n, tensor in enumerate(tensors):
        places = {
            "location": "weights/w.safetensors",
            "offset": str(offset(folder) + n * 64 * MIB),
            "length": str(64 * MIB),
        }
        for key, text in places.items():
            tensor.external_data.add(key=key, value=text)
    graph = helper.make_graph(nodes, "full", value[:1], value[1:], initializer=tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "graphs").mkdir()
    (folder / "graphs/full.onnx").write_bytes(model.SerializeToString())
    requires = toy.requires().model_copy(update={"torch": None, "isa": ()})
    return "graphs/full.onnx", dict(zip(names, wide.state_dict(), strict=True)), requires, "onnxruntime"


def offset(folder):
    """Where the tensors of the safetensors file begin."""
    with (folder / "weights/w.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.fixture(scope="module", params=[with_aoti, with_onnxruntime])
def wide_artifact(request, tmp_path_factory):
    """`WEIGHTS` bytes of weights in one graph."""
    folder, x, wide = tmp_path_factory.mktemp("wide"), torch.ones(1, 4096), Wide().eval()
    (folder / "weights").mkdir()
    save_file(wide.state_dict(), folder / "weights/w.safetensors")
    package, constants, requires, backend = request.param(folder, wide, x)
    graph = toy.graph("full", package, toy.specs(x=x), toy.specs(y=x), constants)
    recipe = {"compile": {"options": {"prepack": False}}}  # what ONNX Runtime packs is each process's own
    toy.write_manifest(
        folder, graphs=(graph,), plans={}, pipeline={}, requires=requires, backend=backend, recipe=recipe
    )
    return folder


@functools.cache
def growth(artifact, cache, copies="", library=""):
    """Bytes by which the memory of two processes is more than that of one."""
    with memory.start_process(OPENS, artifact, cache, copies, library) as first:
        one = memory.read_pss(first.pid)
        with memory.start_process(OPENS, artifact, cache, copies, library) as second:
            return memory.read_pss(first.pid) + memory.read_pss(second.pid) - one


def test_a_second_process_shares_the_weights(wide_artifact, tmp_path):
    cache = str(tmp_path / "cache")
    library = {"onnxruntime": "onnxruntime"}.get(read_manifest(wide_artifact).backend, "")
    empty = growth("", "", library=library)
    own = growth(str(wide_artifact), cache, library=library) - empty
    print(f"the second process adds {own / MIB:.1f} MiB to what its libraries take, {own / WEIGHTS:.1%} of the weights")
    assert own < 0.1 * WEIGHTS
    copied = growth(str(wide_artifact), cache, "copies", library) - empty
    assert copied > 0.2 * WEIGHTS  # 32 MiB that are not shared are noticed


# --- slow: a whole pipeline -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_pictures(tmp_path_factory):
    """The tiny FLUX that also begins from pictures, with plans of 8 and of 5 steps."""
    folder = tmp_path_factory.mktemp("load") / "artifact"
    settings = ("cache.method=pab", "sampler.steps=8", "sampler.image_to_image=true")
    overrides = [word for setting in settings for word in ("--set", setting)]
    for command in (
        ["export", "--recipe", "flux-fast", "--model", "tiny:flux", "--no-verify", "--output", str(folder), *overrides],
        ["plan", str(folder), "--steps", "5"],
    ):
        subprocess.run([sys.executable, "-m", "prebake.exporter", *command, "--quiet"], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("runners", [1, 2, 8])
def test_a_thousand_mixed_requests_get_what_they_would_get_alone(from_pictures, tmp_path, runners):
    pipe = load(from_pictures, cache_dir=tmp_path, runners=runners)
    asked = soak.make_requests(pipe, 1000, seed=runners)
    assert {r.kind for r in asked} == set(soak.REQUEST_KINDS)
    assert {r.arguments["num_inference_steps"] for r in asked} == {5, 8, 10_000}
    alone = [soak.answer_request(pipe, r) for r in asked]
    got = {}
    soak.serve_requests(pipe, iter(enumerate(asked)), 8, got.__setitem__)
    assert [i for i, want in enumerate(alone) if not soak.is_same_answer(got[i], want)] == []
    assert pipe.artifact.runners.free == runners


@pytest.mark.slow
def test_half_a_minute_of_requests_leaves_memory_flat(from_pictures):
    """The whole soak takes 30 minutes: `python benchmarks/soak.py ARTIFACT`."""
    program = Path(soak.__file__)
    done = subprocess.run(
        [sys.executable, str(program), str(from_pictures), "--minutes", "0.5", "--every", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip().endswith("flat")
