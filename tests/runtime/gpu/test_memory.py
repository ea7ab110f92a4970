"""A GPU whose memory runs out, played by an allocation that torch refuses; what is said of it, and that nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prebake.runtime import ArtifactError, load
from prebake.runtime import artifact as opening
from prebake.runtime.attachment.attach import run_denoiser
from prebake.runtime.gpu import graph_loop as recorded
from prebake.runtime.gpu.memory import explain_gpu_memory, is_gpu_out_of_memory, stored_bytes
from prebake.runtime.manifest import read_manifest
from support import toy_model as toy

GPU = torch.device("cuda", 0)
TOLD = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")
IN_CODE = ArtifactError(
    "graph 'full': its compiled code failed in Run: aoti_torch_empty_strided(3, int_array_0, int_array_1) API call failed"
)


TAKEN = {"method": "int8_dynamic", "text_encoders": "int8_weight_only"}


@pytest.fixture(autouse=True)
def a_gpu_of_24_gib(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(0.3 * 2**30), 24 << 30))


@pytest.fixture
def manifest(toy_artifact):
    return read_manifest(toy_artifact)


def while_it(error: BaseException, manifest, able=(), device=GPU) -> None:
    with explain_gpu_memory(Path("artifacts/x"), "weights were loaded", manifest, device, able):
        raise error


@pytest.mark.parametrize("error", [TOLD, IN_CODE, RuntimeError("CUDA error: out of memory")])
def test_the_sentence_says_what_how_much_and_the_ways_out(manifest, error):
    big = [e.model_copy(update={"size": 17 << 30}) if e.path.startswith("weights/") else e for e in manifest.files]
    with pytest.raises(ArtifactError) as said:
        while_it(error, manifest.model_copy(update={"files": tuple(big)}), ("text_encoder",))
    assert str(said.value) == (
        "artifacts/x: the GPU's memory ran out while weights were loaded: by the manifest it holds weights of 34.0 GiB and "
        "stored values of 0.0 GiB, besides what the code itself needs, and it has 24.0 GiB, 0.3 GiB of them free; load it with "
        "offload=True, which keeps text_encoder (0.0 GiB) off it between prompts, export again with "
        "quantize.method=int8_dynamic or quantize.text_encoders=int8_weight_only or smaller shapes, or free what other programs "
        "hold of it"
    )
    assert said.value.__cause__ is error


def test_ways_that_are_taken_already_are_not_offered(manifest):
    quantized = manifest.model_copy(update={"recipe": {"quantize": TAKEN}, "sites": ()})
    with pytest.raises(ArtifactError, match=r"besides.* free; export again with smaller shapes, or free") as said:
        while_it(TOLD, quantized)
    assert "offload" not in str(said.value)
    assert "stored values" not in str(said.value)


def test_stored_values_are_counted_in_every_slot(manifest):
    assert stored_bytes(manifest) == 2 * toy.N * 16 * 4


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such thing"),
        ArtifactError(
            "offload: 9.1 GiB of weights could not be pinned (CUDA error: out of memory); load without offload"
        ),
        KeyboardInterrupt(),
    ],
)
def test_what_is_not_about_the_gpus_memory_passes(manifest, error):
    with pytest.raises(type(error)) as said:
        while_it(error, manifest)
    assert said.value is error


def test_on_the_cpu_it_is_none_of_its_business(manifest):
    with pytest.raises(torch.OutOfMemoryError):
        while_it(TOLD, manifest, device=torch.device("cpu"))


def test_it_is_told_once(manifest):
    with pytest.raises(ArtifactError) as said, explain_gpu_memory("outer", "that", manifest, GPU):
        while_it(TOLD, manifest)
    assert str(said.value).startswith("artifacts/x: ")


def test_an_error_on_the_way_out_of_a_recording_does_not_hide_it():
    invalidated = RuntimeError("cudaErrorStreamCaptureInvalidated")
    assert not is_gpu_out_of_memory(invalidated)
    invalidated.__context__ = TOLD  # as Python does where the end of a `with` fails too
    assert is_gpu_out_of_memory(invalidated)


# --- where it can happen ----------------------------------------------------------------------------------------------


def refused(*_, **__):
    raise TOLD


def on_a_gpu(monkeypatch, *modules) -> None:
    """What asks for the device in these modules is told of a GPU; tensors stay where they are."""
    for module in modules:
        asked = module.explain_gpu_memory
        monkeypatch.setattr(module, "explain_gpu_memory", lambda *a, asked=asked, **k: asked(*a[:3], GPU, *a[4:], **k))


def test_while_weights_are_loaded(toy_artifact, cache_dir, monkeypatch):
    on_a_gpu(monkeypatch, opening)
    monkeypatch.setattr(opening, "map_weights", refused)
    words = r"memory ran out while weights were loaded: .*load it with offload=True, which keeps text_encoder"
    with pytest.raises(ArtifactError, match=words):
        load(toy_artifact, cache_dir=cache_dir)


def test_while_images_are_made(toy_artifact, cache_dir, monkeypatch):
    from prebake.runtime.drawing import drawing

    on_a_gpu(monkeypatch, drawing)
    pipe = load(toy_artifact, cache_dir=cache_dir)
    with monkeypatch.context() as during:
        during.setattr(pipe.artifact.graphs["reuse"], "_model", refused)
        with pytest.raises(ArtifactError, match=r"memory ran out while images were made: .*offload=True"):
            pipe("a red circle", seed=0)
    assert pipe.artifact.runners.free == pipe.artifact.runners.count
    assert pipe("a red circle", seed=0).images


def test_while_an_attached_denoiser_runs(toy_artifact, cache_dir, monkeypatch):
    from types import SimpleNamespace

    from prebake.runtime.attachment import attach as attachment

    on_a_gpu(monkeypatch, attachment)
    artifact = load(toy_artifact, cache_dir=cache_dir).artifact
    monkeypatch.setattr(artifact.graphs["full"], "_model", refused)
    evaluation = SimpleNamespace(variant="full")
    run = SimpleNamespace(plan=SimpleNamespace(evaluations=[evaluation], name="4"), evaluation=0, stored={}, branch=0)
    given = {s.name: torch.zeros(s.shape) for s in artifact.graphs["full"].graph.inputs}
    with pytest.raises(ArtifactError, match="memory ran out while the denoiser ran") as said:
        run_denoiser(artifact, run, SimpleNamespace(of=0), given)
    assert "offload" not in str(said.value)


def test_a_recording_that_ran_out_is_not_called_impossible():
    from support.recorded_loop import through

    loop = recorded.RecordedLoop(refused)
    through(loop, 0)
    with pytest.raises(torch.OutOfMemoryError):
        through(loop, 1)
