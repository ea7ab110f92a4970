"""TensorRT and TensorRT-RTX, whose bindings have the same names: an engine in, a callable graph out.

The twin of `exporter/lower/tensorrt/__init__.py`. An engine is native code, and has no weights in it: constants are inputs of its
network, and every engine is bound to the artifact's tensors where they lie. Scratch memory is one block, for the graph
that needs the most; graphs run in turn on a stream of their own, which waits for the caller's and which the caller's
waits for. So calls from several streams or threads cannot meet in it. What TensorRT-RTX compiles for this GPU when an engine is
opened and first run is kept in the user's private cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError
from ..extras import install_command
from ..gpu.capability import CAPABILITY_KEY, capability_name, cuda_of_driver, driver_problems
from ..manifest import Graph, Manifest, Requires
from ..storage.user_cache import read_private, write_private
from . import OpenContext, refuse_unbound_constants

TENSORRT_PACKAGES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Flavour -> what is imported, and stands with its version in the manifest's `requires.packages`."""
CACHE_FOLDER = "tensorrt-rtx"
"""The folder of the cache with what TensorRT-RTX has compiled here, a file for each engine and kind of GPU."""
ALIGNMENT_BYTES = 256
"""Bytes at whose multiples TensorRT wants tensors and scratch to begin; torch's allocations on a GPU do."""


def problems(requires: Requires) -> Iterator[str]:
    """The library and its exact version, which is an engine's format; then, where there is a GPU, its driver and its kind."""
    names = sorted(set(TENSORRT_PACKAGES.values()) & requires.packages.keys())
    if len(names) != 1:
        yield "manifest.json [requires.packages]: names no flavour of TensorRT; export again"
        return
    name, wanted = names[0], requires.packages[names[0]]
    try:
        version = importlib.import_module(name).__version__
    except ImportError as e:
        yield f"was built with {name} {wanted}, which cannot be imported here ({e}); {install_command(name)}"
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
    yield from driver_problems(packages, cuda)
    here = capability_name(capability)
    if here not in packages.get(CAPABILITY_KEY, "").split():
        yield (
            f"was built for GPUs of compute capability {packages.get(CAPABILITY_KEY, 'unknown')}, this one has {here}; "
            f"export again with {here} among compile.options.compute_capabilities, if TensorRT has it"
        )


def package_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """None: only the library itself can read its files, and to read them there is to open them."""
    return iter(())


def open_models(opening: OpenContext) -> Mapping[str, BoundEngine | CudaGraphEngine]:
    """Every graph by name, bound to its constants and to the scratch memory that all of them share."""
    trt = importlib.import_module(
        next(iter(set(TENSORRT_PACKAGES.values()) & opening.manifest.requires.packages.keys()))
    )
    turn = SharedStream(opening.device)
    models = {
        graph.name: BoundEngine(trt, graph, turn, *open_engine(trt, opening, graph))
        for graph in opening.manifest.graphs
    }
    for name, model in models.items():
        model.bind(opening.constants[name])
    turn.share_scratch(models.values())
    if opening.manifest.recipe.get("compile", {}).get("options", {}).get("cuda_graphs"):
        return {name: CudaGraphEngine(model) for name, model in models.items()}
    return models


def open_engine(trt: Any, opening: OpenContext, graph: Graph) -> tuple[Any, EngineCache | None]:
    """The engine in a graph's file, and of TensorRT-RTX what it has compiled of it for this GPU before."""
    data, file = opening.code(graph.package), opening.folder / graph.package
    log = engine_logger(trt)
    log.errors.clear()
    engine = trt.Runtime(log).deserialize_cuda_engine(data)
    if engine is None:
        why = "; ".join(log.errors) or "it does not say why"
        raise ArtifactError(
            f"{file}: {trt.__name__} {trt.__version__} refuses the engine: {why}; export again for this GPU"
        )
    if trt.__name__ != TENSORRT_PACKAGES["rtx"]:
        return engine, None
    gpu = torch.cuda.get_device_properties(opening.device)
    name = hashlib.sha256(f"{trt.__version__} {gpu.name} {hashlib.sha256(data).hexdigest()}".encode()).hexdigest()
    return engine, EngineCache.of(trt, engine, opening.cache_dir, f"{CACHE_FOLDER}/{name}")


@dataclass
class EngineCache:
    """What TensorRT-RTX compiles of an engine for the GPU at hand, which takes it seconds, from one process to the next.

    The library itself compares what it is given with GPU, driver and its own version, and compiles anew where they differ.
    Configuration and cache have to live as long as the context that was made with them.
    """

    config: Any
    cache: Any
    place: tuple[Path | None, str]
    before: bytes
    saved: bool = False

    @classmethod
    def of(cls, trt: Any, engine: Any, folder: Path | None, path: str) -> EngineCache:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        cache = config.create_runtime_cache()
        before = read_private(folder, path)
        if before and not cache.deserialize(before):
            before = b""
        config.set_runtime_cache(cache)
        return cls(config, cache, (folder, path), before)

    def save(self) -> None:
        """Keeps it for later processes, if there is anything new; asked again, does nothing."""
        if not self.saved:
            self.saved = True
            data = bytes(self.cache.serialize())
            if data != self.before:
                write_private(*self.place, data)


@functools.cache
def engine_logger(trt: Any) -> Any:
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


class SharedStream:
    """The stream, scratch memory and lock that an artifact's graphs share."""

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

    def __init__(self, trt: Any, graph: Graph, turn: SharedStream, engine: Any, compiled: EngineCache | None):
        self.graph, self.engine, self.turn, self.compiled = graph, engine, turn, compiled
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
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = engine.create_execution_context(compiled.config if compiled else managed)
        if self.context is None:
            raise ArtifactError(f"graph {graph.name!r}: TensorRT has no memory for its context; free some on the GPU")
        self.scratch_bytes = engine.device_memory_size_v2
        self._kept: dict[str, torch.Tensor] = {}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Points every constant at the caller's tensor. Raises ArtifactError for one that is missing or that does not fit."""
        refuse_unbound_constants(self.graph.name, self.constants, tensors)
        for name in sorted(self.constants):
            tensor = weight_view(tensors[name], tuple(self.engine.get_tensor_shape(name)))
            self._check(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            self._kept[name] = align_tensor(tensor.contiguous())
            self.set_address(name, self._kept[name])

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, freshly allocated, once the work before them on torch's current stream is done. The caller has
        checked the inputs: nothing below this line does."""
        turn, caller = self.turn, torch.cuda.current_stream(self.turn.device)
        read = [(n, align_tensor(t)) for n, t in zip(self.inputs, inputs, strict=True) if n is not None]
        made = self.allocate_outputs()
        with turn.lock:
            for name, tensor in (*read, *zip((n for n, _, _ in self.outputs), made, strict=True)):
                self.set_address(name, tensor)
            turn.stream.wait_stream(caller)
            self.enqueue()
            # what is freed after this belongs to the caller's stream, and is used again behind the engine's work
            caller.wait_stream(turn.stream)
        return made

    def allocate_outputs(self) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device=self.turn.device) for _, shape, dtype in self.outputs]

    def enqueue(self) -> None:
        """The engine's work on the artifact's stream, with the tensors that it was pointed at. Raises ArtifactError."""
        if not self.context.execute_async_v3(self.turn.stream.cuda_stream):
            raise ArtifactError(f"graph {self.graph.name!r}: TensorRT could not run it on this GPU")
        if self.compiled:
            self.compiled.save()

    def is_recordable(self) -> bool:
        """Whether the engine's work can be a CUDA graph. TensorRT has no such question, only TensorRT-RTX."""
        asked = getattr(self.context, "is_stream_capturable", None)
        return asked is None or asked(self.turn.stream.cuda_stream)

    def set_address(self, name: str, tensor: torch.Tensor) -> None:
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise ArtifactError(f"graph {self.graph.name!r}: TensorRT refuses the address of {name!r}")

    def _check(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raises ArtifactError unless the engine's tensor of that name is on the GPU, and of that shape and dtype: it would
        read beyond another one's end."""
        built = tuple(self.engine.get_tensor_shape(name))
        wanted = DTYPE_NAMES.get(self.dtypes[name], self.dtypes[name])
        if (built, wanted) != (shape, dtype) or self.engine.get_tensor_location(name).name != "DEVICE":
            raise ArtifactError(
                f"graph {self.graph.name!r}: {name!r} was built as {wanted} {list(built)}, the artifact has {dtype} "
                f"{list(shape)}; export again"
            )


class CudaGraphEngine:
    """An engine whose work is a CUDA graph from its second call on: recorded once, then launched as a whole.

    What is recorded are addresses, so the engine reads and writes tensors of its own, and inputs are copied into them and
    outputs out of them. Weights that are written in place are read where they are, as ever.
    """

    def __init__(self, model: BoundEngine):
        self.model = model
        given = [spec for spec, name in zip(model.graph.inputs, model.inputs, strict=True) if name is not None]
        device = model.turn.device
        self.inputs = [torch.empty(s.shape, dtype=getattr(torch, s.dtype), device=device) for s in given]
        self.outputs = model.allocate_outputs()
        for name, tensor in (
            *zip((s.name for s in given), self.inputs, strict=True),
            *zip((n for n, _, _ in model.outputs), self.outputs, strict=True),
        ):
            model.set_address(name, tensor)
        self.graph: Any = None
        self.calls = 0

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, freshly allocated, once the work before them on torch's current stream is done, as `BoundEngine` gives them."""
        turn, caller = self.model.turn, torch.cuda.current_stream(self.model.turn.device)
        read = [t for n, t in zip(self.model.inputs, inputs, strict=True) if n is not None]
        made = self.model.allocate_outputs()
        with turn.lock:
            turn.stream.wait_stream(caller)
            with torch.cuda.stream(turn.stream):
                copy_tensors(read, self.inputs)
                self._run()
                copy_tensors(self.outputs, made)
            caller.wait_stream(turn.stream)
        return made

    def _run(self) -> None:
        """The first call allocates and compiles, which cannot be recorded; the second is recorded, where that is possible."""
        if self.calls == 1 and self.model.is_recordable():
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.model.turn.stream, capture_error_mode="thread_local"):
                self.model.enqueue()
        self.calls += 1
        if self.graph is None:
            self.model.enqueue()
        else:
            self.graph.replay()


def copy_tensors(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    for a, b in zip(source, target, strict=True):
        b.copy_(a, non_blocking=True)


DTYPE_NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
"""TensorRT's names, in small letters, of the dtypes that torch calls otherwise."""


def weight_view(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight [N, C, H, W] that lies as [N, H, W, C] seen so where the engine takes it so; any other as it is."""
    if tensor.dim() == 4 and (turned := tensor.permute(0, 2, 3, 1)).is_contiguous() and turned.shape == shape:
        return turned
    return tensor


def align_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it begins in the middle of an allocation, as a row of a table does."""
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()
