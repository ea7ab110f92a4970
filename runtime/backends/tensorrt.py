"""TensorRT and TensorRT-RTX, whose bindings have the same names: an engine in, a callable graph out.

The twin of `exporter/lower/tensorrt.py`. An engine is native code, and has no weights in it: constants are inputs of its
network, and every engine is bound to the artifact's tensors where they lie. Scratch memory is one block, for the graph
that needs the most; graphs run in turn on a stream of their own, which waits for the caller's and which the caller's
waits for. So calls from several streams or threads cannot meet in it.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError
from ..extras import way_to
from ..files import read_listed
from ..manifest import Graph, Manifest, Requires

PACKAGES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Flavour -> what is imported, and stands with its version in the manifest's `requires.packages`."""
CUDA = "cuda"
CAPABILITY = "compute_capability"
ALIGNED = 256
"""Bytes at whose multiples TensorRT wants tensors and scratch to begin; torch's allocations on a GPU do."""


def problems(requires: Requires) -> Iterator[str]:
    """The library and its exact version, which is an engine's format; then, where there is a GPU, its driver and its kind."""
    names = sorted(set(PACKAGES.values()) & requires.packages.keys())
    if len(names) != 1:
        yield "manifest.json [requires.packages]: names no flavour of TensorRT; export again"
        return
    name, wanted = names[0], requires.packages[names[0]]
    try:
        version = importlib.import_module(name).__version__
    except ImportError as e:
        yield f"was built with {name} {wanted}, which cannot be imported here ({e}); {way_to(name)}"
    else:
        if version != wanted:
            yield (
                f"was built with {name} {wanted}, this is {name} {version}, and an engine runs in the version that "
                f"built it; install {name} {wanted}, or export again"
            )
    if torch.cuda.is_available():
        yield from gpu_problems(requires.packages, cuda_of_driver(), torch.cuda.get_device_capability())


def gpu_problems(packages: Mapping[str, str], cuda: int, capability: tuple[int, int]) -> Iterator[str]:
    """What the driver, for CUDA `cuda`, and a GPU of that compute capability lack."""
    if cuda < int(packages.get(CUDA, 0)):
        yield f"needs a driver for CUDA {packages[CUDA]}, this one is for CUDA {cuda}; update the NVIDIA driver"
    here = "sm{}{}".format(*capability)
    if here not in packages.get(CAPABILITY, "").split():
        yield (
            f"was built for GPUs of compute capability {packages.get(CAPABILITY, 'unknown')}, this one has {here}; "
            f"export again with {here} among compile.options.compute_capabilities, if TensorRT has it"
        )


def cuda_of_driver() -> int:
    """The CUDA release, such as 13, that the driver supports; of a torch that sees a GPU."""
    return torch._C._cuda_getDriverVersion() // 1000  # pyright: ignore[reportAttributeAccessIssue]


def package_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """None: only the library itself can read its files, and to read them there is to open them."""
    return iter(())


def open_models(
    folder: Path,
    manifest: Manifest,
    constants: Mapping[str, Mapping[str, torch.Tensor]],
    device: torch.device,
    cache_dir: Path | None,
) -> dict[str, BoundEngine]:
    """Every graph by name, bound to its constants and to the scratch memory that all of them share."""
    trt = importlib.import_module(next(iter(set(PACKAGES.values()) & manifest.requires.packages.keys())))
    turn = Turn(device)
    engines = {graph.name: open_engine(trt, folder, manifest, graph) for graph in manifest.graphs}
    models = {graph.name: BoundEngine(trt, graph, engines[graph.name], turn) for graph in manifest.graphs}
    for name, model in models.items():
        model.bind(constants[name])
    turn.share_scratch(models.values())
    return models


def open_engine(trt: Any, folder: Path, manifest: Manifest, graph: Graph) -> Any:
    """The engine in a graph's file, whose bytes are read once: what was hashed is what is opened."""
    data = read_listed(folder, manifest, graph.package)
    log = logger(trt)
    log.errors.clear()
    engine = trt.Runtime(log).deserialize_cuda_engine(data)
    if engine is None:
        why = "; ".join(log.errors) or "it does not say why"
        raise ArtifactError(
            f"{folder / graph.package}: {trt.__name__} {trt.__version__} refuses the engine: {why}; export again for this GPU"
        )
    return engine


@functools.cache
def logger(trt: Any) -> Any:
    """What keeps the library's errors, and all that it says in `lines` where that is a list. The library holds on to the
    first logger that it is given, so a process has one, which the exporter uses too."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.lines: list[str] | None = None

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(" ".join(msg.split()))
            if self.lines is not None:
                self.lines += msg.splitlines()

    return Log()


class Turn:
    """What an artifact's graphs take turns with: a stream, scratch memory, and a lock around using them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream(device)
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def share_scratch(self, models: Collection[BoundEngine]) -> None:
        """One block, as large as the largest that a graph needs, for all of them."""
        size = max((model.scratch_bytes for model in models), default=0)
        self.scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        for model in models:
            model.context.set_device_memory(self.scratch.data_ptr(), self.scratch.numel())


class BoundEngine:
    """An engine with a context, ready to be called with flat tensors once its constants are bound."""

    def __init__(self, trt: Any, graph: Graph, engine: Any, turn: Turn):
        self.graph, self.engine, self.turn = graph, engine, turn
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        given = {n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        self.inputs = [spec.name if spec.name in given else None for spec in graph.inputs]  # TensorRT drops unread ones
        self.constants = given - {spec.name for spec in graph.inputs}
        self.outputs = [(spec.name, spec.shape, getattr(torch, spec.dtype)) for spec in graph.outputs]
        if wrong := sorted((set(names) - given) ^ {spec.name for spec in graph.outputs}):
            raise ArtifactError(
                f"graph {graph.name!r}: output {wrong[0]!r} is not in both engine and manifest; export again"
            )
        self.dtypes = {n: engine.get_tensor_dtype(n).name.lower() for n in names}
        for spec in (*graph.inputs, *graph.outputs):
            if spec.name in names:
                self._check(spec.name, spec.shape, spec.dtype)
        self.context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.context is None:
            raise ArtifactError(f"graph {graph.name!r}: TensorRT has no memory for its context; free some on the GPU")
        self.scratch_bytes = engine.device_memory_size_v2
        self._kept: dict[str, torch.Tensor] = {}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Points every constant at the caller's tensor. Raises ArtifactError for one that is missing or that does not fit."""
        if missing := sorted(self.constants - tensors.keys()):
            raise ArtifactError(
                f"graph {self.graph.name!r}: constant {missing[0]!r} is not bound ({len(missing)} in all); export again"
            )
        for name in sorted(self.constants):
            tensor = seen_as(tensors[name], tuple(self.engine.get_tensor_shape(name)))
            self._check(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            self._kept[name] = aligned(tensor.contiguous())
            self._point(name, self._kept[name])

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, freshly allocated, once the work before them on torch's current stream is done. The caller has
        checked the inputs: nothing below this line does."""
        turn, caller = self.turn, torch.cuda.current_stream(self.turn.device)
        read = [(n, aligned(t)) for n, t in zip(self.inputs, inputs, strict=True) if n is not None]
        made = [torch.empty(shape, dtype=dtype, device=turn.device) for _, shape, dtype in self.outputs]
        with turn.lock:
            for name, tensor in (*read, *((n, t) for (n, _, _), t in zip(self.outputs, made, strict=True))):
                self._point(name, tensor)
            turn.stream.wait_stream(caller)
            if not self.context.execute_async_v3(turn.stream.cuda_stream):
                raise ArtifactError(f"graph {self.graph.name!r}: TensorRT could not run it on this GPU")
            # what is freed after this belongs to the caller's stream, and is used again behind the engine's work
            caller.wait_stream(turn.stream)
        return made

    def _point(self, name: str, tensor: torch.Tensor) -> None:
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise ArtifactError(f"graph {self.graph.name!r}: TensorRT refuses the address of {name!r}")

    def _check(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raises ArtifactError unless the engine's tensor of that name is on the GPU, and of that shape and dtype: it would
        read beyond another one's end."""
        built = tuple(self.engine.get_tensor_shape(name))
        wanted = DTYPES.get(self.dtypes[name], self.dtypes[name])
        if (built, wanted) != (shape, dtype) or self.engine.get_tensor_location(name).name != "DEVICE":
            raise ArtifactError(
                f"graph {self.graph.name!r}: {name!r} was built as {wanted} {list(built)}, the artifact has {dtype} "
                f"{list(shape)}; export again"
            )


DTYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
"""TensorRT's names, in small letters, of the dtypes that torch calls otherwise."""


def seen_as(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight [N, C, H, W] that lies as [N, H, W, C] seen so where the engine takes it so; any other as it is."""
    if tensor.dim() == 4 and (turned := tensor.permute(0, 2, 3, 1)).is_contiguous() and turned.shape == shape:
        return turned
    return tensor


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it begins in the middle of an allocation, as a row of a table does."""
    return tensor if tensor.data_ptr() % ALIGNED == 0 else tensor.clone()
