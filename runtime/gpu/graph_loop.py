"""The denoising loop as one recorded piece of work: a whole trajectory is one launch, without a copy, an allocation or a wait.

`recorded_loop` has the signature of `replay.replay`. The plan decides everything beforehand, so that the loop can be run once
while the device writes down what it is asked for: each variant's work, the updates between, and where stored values lie,
which a COMBINE variant then reads where a COMPUTE variant has written them. Memory is planned by torch's allocator, which
reuses within a recording what the loop lets go of. Inputs are copied into tensors of the recording's own, since what is
recorded are addresses. On a GPU a recording is a CUDA graph; this has not run on one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArtifactError, first_line
from ..manifest import Manifest, Site
from ..replay import DenoiserVariant, PlanTables, replay
from .memory import is_gpu_out_of_memory

CUDA_GRAPHS_OPTION = "cuda_graphs"
"""Of `compile.options`, which the manifest's recipe keeps."""
MAX_RECORDINGS = 4
"""Recordings that are kept; each holds a trajectory's memory. Those used longest ago are let go of."""
DeviceWork = Callable[[], torch.Tensor]
Recorder = Callable[[DeviceWork], tuple[torch.Tensor, Callable[[], Any]]]
"""`record(work)` calls `work` once, which queues and does not compute, and returns the tensor that it will be in, and what launches it."""


def record_cuda_graph(work: DeviceWork) -> tuple[torch.Tensor, Callable[[], Any]]:
    """A CUDA graph. What other threads do meanwhile is none of its business."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        made = work()
    return made, graph.replay


def loop_of(manifest: Manifest) -> Callable[..., torch.Tensor]:
    """The loop that the artifact's calls go through: recorded where its recipe asks for it. Engines of TensorRT are recorded
    one by one (`backends/tensorrt.py`), so their loop is not."""
    asked = manifest.recipe.get("compile", {}).get("options", {}).get(CUDA_GRAPHS_OPTION)
    if asked and manifest.backend == "aoti" and manifest.requires.device == "cuda":
        return RecordedLoop(record_cuda_graph)
    return replay


@dataclass
class LoopRecording:
    """What is copied into, what comes out, and `launch`; before anything was recorded, nothing. `tables` stay alive in it."""

    tables: PlanTables
    given: tuple[torch.Tensor, ...] = ()
    made: torch.Tensor | None = None
    launch: Callable[[], Any] | None = None


class RecordedLoop:
    """`replay.replay`, recorded at the second call of a plan: in the first, libraries load their code and take their memory, which
    cannot be recorded. A call that looks at each step (`on_evaluation`) is not recorded, nor is what it sees."""

    def __init__(self, record: Recorder) -> None:
        self._record = record
        self._recordings: OrderedDict[Any, LoopRecording] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self,
        tables: PlanTables,
        variants: Mapping[str, DenoiserVariant],
        sites: Mapping[str, Site],
        inputs: Mapping[str, torch.Tensor],
        latents: torch.Tensor,
        *,
        noise: Iterable[torch.Tensor] = (),
        on_evaluation: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """The final latents, like those of `replay`, in a tensor of the caller's own. Raises ArtifactError where the device cannot record."""
        noise = tuple(noise)
        if on_evaluation is not None:
            return replay(tables, variants, sites, inputs, latents, noise=noise, on_evaluation=on_evaluation)
        with self._lock:
            key = (tables.plan, len(latents), tuple(inputs))
            if key not in self._recordings:
                self._recordings[key] = LoopRecording(tables)
                self._evict_recordings()
                return replay(tables, variants, sites, inputs, latents, noise=noise)
            self._recordings.move_to_end(key)
            recording = self._recordings[key]
            given = (latents, *inputs.values(), *noise)
            if recording.launch is None:
                self._record_loop(recording, variants, sites, tuple(inputs), given)
            for source, target in zip(given, recording.given, strict=True):
                target.copy_(source, non_blocking=True)
            assert recording.launch is not None
            assert recording.made is not None
            recording.launch()
            return recording.made.clone()

    def _record_loop(
        self,
        recording: LoopRecording,
        variants: Mapping[str, DenoiserVariant],
        sites: Mapping[str, Site],
        names: tuple[str, ...],
        given: tuple[torch.Tensor, ...],
    ) -> None:
        own = tuple(t.clone() for t in given)
        latents, inputs, noise = own[0], dict(zip(names, own[1:], strict=False)), own[1 + len(names) :]
        try:
            made, launch = self._record(lambda: replay(recording.tables, variants, sites, inputs, latents, noise=noise))
        except RuntimeError as e:
            if is_gpu_out_of_memory(e):
                raise
            why = first_line(e)
            raise ArtifactError(
                f"manifest.json [recipe.compile.options.{CUDA_GRAPHS_OPTION}]: this torch could not record plan {recording.tables.plan.name!r} "
                f"({why}); export again without that option"
            ) from e
        recording.given, recording.made, recording.launch = own, made, launch

    def _evict_recordings(self) -> None:
        while len(self._recordings) > MAX_RECORDINGS:
            self._recordings.popitem(last=False)
