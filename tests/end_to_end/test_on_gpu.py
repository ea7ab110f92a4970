"""What only a GPU can show of a whole pipeline: a trajectory that never waits, memory as planned, weights as fast as the disk.

None of it has run yet. What of it can be without a GPU is tested elsewhere: test_gpu_trace.py, runtime/test_offload.py,
runtime/test_gpu_memory.py, runtime/test_recorded.py.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile, record_function

from prebake.runtime import ArtifactError, load
from prebake.runtime.gpu.memory import stored_bytes
from prebake.runtime.weights import map_weights
from support.gpu_trace import ALLOCATES, began, count, events_of, waits

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """The tiny FLUX with attention reuse, for this GPU, its trajectories recorded."""
    from prebake.exporter.pipeline import ExportOptions, export
    from prebake.exporter.progress import open_progress
    from prebake.exporter.recipe.resolve import resolve

    asked = ("compile.device=cuda", "compile.options.cuda_graphs=true", "cache.method=pab", "quantize.method=none")
    gates = ("verify.cached_psnr_db=20", "verify.seeds=1")
    folder = tmp_path_factory.mktemp("gpu") / "artifact"
    with open_progress("quiet") as quiet:
        export(resolve("flux-fast", (*asked, *gates), "tiny:flux"), folder, ExportOptions(), quiet)
    return folder


def called(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, a span of that name in a profile."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return run


def profiled_call(pipe: Any, folder: Path) -> tuple[list[Any], float, float]:
    """The events of one call, and when its loop and its decoder began."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        pipe(PROMPT, seed=0)
        torch.cuda.synchronize()
    events = events_of(profiled, folder)
    return events, began(events, "test: loop"), began(events, "test: decode")


def test_between_the_first_step_and_the_decode_nothing_waits(artifact, tmp_path):
    pipe = load(artifact)
    for _ in range(3):  # libraries load, the plan is recorded, and the recording has run
        pipe(PROMPT, seed=0)
    recorded = pipe._loop
    pipe._loop, pipe._decode = called("test: loop", recorded), called("test: decode", pipe._decode)
    events, begin, end = profiled_call(pipe, tmp_path)
    assert waits(events, begin, end) == []
    assert count(events, begin, end, ("cudaGraphLaunch",)) == 1
    assert count(events, begin, end, ALLOCATES) == 0

    def looks(*args: Any, **kwargs: Any) -> torch.Tensor:
        latents = recorded(*args, **kwargs)
        float(latents.sum())
        return latents

    pipe._loop = called("test: loop", looks)  # the canary
    assert waits(*profiled_call(pipe, tmp_path))


def test_a_loop_step_by_step_does_not_wait_either(artifact, tmp_path):
    from prebake.runtime.replay import replay

    pipe = load(artifact)
    pipe._loop, pipe._decode = called("test: loop", replay), called("test: decode", pipe._decode)
    pipe(PROMPT, seed=0)
    assert waits(*profiled_call(pipe, tmp_path)) == []


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes of torch's that `run` takes at most, beyond those that are taken before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def workspaces(artifact: Any) -> dict[str, int]:
    """Graph -> bytes that one call of it takes at most, its outputs among them."""

    def alone(graph: Any) -> int:
        zeros = {
            s.name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype), device=artifact.device)
            for s in graph.graph.inputs
        }
        return peak_of(lambda: graph(zeros))

    return {name: alone(graph) for name, graph in artifact.graphs.items()}


def test_memory_is_weights_the_largest_workspace_and_stored_values(artifact):
    from prebake.runtime.replay import replay

    nothing = torch.cuda.memory_allocated()
    pipe = load(artifact)
    pipe._loop = replay  # a recording keeps a trajectory's memory for itself
    pipe(PROMPT, seed=0)  # cuBLAS takes its workspace
    held = torch.cuda.memory_allocated() - nothing
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in pipe.artifact.weights.values()}
    # torch rounds each tensor up to 512 bytes; cuBLAS and cuBLASLt take up to 32 MiB each on Hopper; plans take rows of 256 bytes
    assert sum(weights.values()) <= held <= sum(weights.values()) + 512 * len(weights) + (80 << 20)

    workspace, inputs = max(workspaces(pipe.artifact).values()), pipe.artifact.graphs["full"].graph.inputs
    ends = sum(torch.Size(s.shape).numel() * getattr(torch, s.dtype).itemsize for s in inputs)
    # a scheduler's history is three latents and three outputs, a prompt's embeddings are copied once; and allocations are
    # rounded up to 512 bytes, or from 1 MiB on to 2 MiB
    allowed = workspace + stored_bytes(pipe.artifact.manifest) + 8 * ends + (8 << 20)
    assert peak_of(lambda: pipe(PROMPT, seed=0)) <= allowed

    kept = []
    hoard = lambda *_: kept.append(torch.empty(allowed, dtype=torch.uint8, device="cuda"))  # noqa: E731
    assert peak_of(lambda: pipe(PROMPT, seed=0, callback_on_step_end=hoard)) > allowed  # the canary


def test_text_encoders_leave_the_device(artifact):
    plain = load(artifact)
    expected = plain(PROMPT, seed=0, output_type="pt").images
    whole = sum(t.nbytes for t in plain.artifact.weights.values())
    del plain
    before = torch.cuda.memory_allocated()
    pipe = load(artifact, offload=True)
    away = [k for g in pipe.artifact.manifest.graphs if g.name == "text_encoder" for k in g.constants.values()]
    leaves = sum(pipe.artifact.weights[key].nbytes for key in away)
    assert 0 < leaves < whole
    taken = []
    for _ in range(3):
        made = pipe(PROMPT, seed=0, output_type="pt").images
        assert torch.equal(made, expected)  # the same kernels in the same order
        del made
        taken.append(torch.cuda.memory_allocated() - before)
    assert taken[1] == taken[2]  # nothing stays of a visit
    sizes = []

    def look(*_: Any) -> None:
        sizes.append(sum(pipe.artifact.weights[key].untyped_storage().nbytes() for key in away))

    pipe(PROMPT, seed=0, callback_on_step_end=look)
    assert set(sizes) == {0}


def test_memory_that_runs_out_is_told_in_a_sentence(artifact):
    pipe = load(artifact)
    pipe(PROMPT, seed=0)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    hoard = []
    try:
        for power in range(30, 8, -1):  # every gap in what torch has taken
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    hoard.append(torch.empty(1 << power, dtype=torch.uint8, device="cuda"))
        with pytest.raises(ArtifactError, match=r"the GPU's memory ran out while images were made: .* GiB"):
            pipe(PROMPT, seed=0)
    finally:
        hoard.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert pipe(PROMPT, seed=0).images


def test_weights_are_read_as_fast_as_the_disk_gives_them(tmp_path, capsys):
    """Prints both rates, of a file of 2 GiB that is not in memory."""
    path = tmp_path / "weights.safetensors"
    weights = {f"w{i}": torch.randn(8192, 8192, dtype=torch.bfloat16) for i in range(16)}
    save_file(weights, path)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty(1, device=device)

    def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        begun = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        return time.perf_counter() - begun, result

    def read() -> int:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(64 << 20)
            return sum(iter(lambda: file.readinto(buffer), 0))

    disk, size = seconds(read)
    loaded, there = seconds(lambda: map_weights({path: path}, device))
    with capsys.disabled():
        print(
            f"\n{size / 2**30:.1f} GiB: disk {size / disk / 2**30:.2f} GiB/s, to the GPU {size / loaded / 2**30:.2f} GiB/s"
        )
    assert there.keys() == weights.keys()
    assert all(torch.equal(there[key].cpu(), weight) for key, weight in weights.items())
