"""A `tensorrt_rtx` that runs on the CPU: an engine is JSON, and multiplies what lies at the addresses that it was given.

Streams, CUDA graphs and the device are torch's to give: `install` puts such there that also write down.

It has the names that `runtime/backends/tensorrt.py` calls, as the bindings of TensorRT-RTX 1.7 spell them, and writes each
call down in `events`.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import json
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

VERSION = "1.7.1.116"
BYTES = {"FLOAT": (torch.float32, 4), "BF16": (torch.bfloat16, 2)}


class Severity(enum.Enum):
    ERROR = 1
    VERBOSE = 4


class ILogger:
    Severity = Severity


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 2


def engine(
    inputs: dict[str, tuple[int, ...]], output: dict[str, tuple[int, ...]], product: tuple[str, str], **more: Any
) -> bytes:
    """An engine whose one output is the product of two of its inputs, as a file."""
    return json.dumps({"inputs": inputs, "outputs": output, "product": product, "scratch": 0, **more}).encode()


class Engine:
    def __init__(self, description: dict[str, Any], events: list[tuple[Any, ...]]):
        self.description, self.events = description, events
        self.tensors = {**description["inputs"], **description["outputs"]}
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size_v2 = description["scratch"]

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[i]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.description["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.tensors[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return enum.Enum("DataType", ["FLOAT", "BF16"])[self.description.get("dtypes", {}).get(name, "FLOAT")]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self.description.get("locations", {}).get(name, "DEVICE")]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self)

    def create_execution_context(self, config: RuntimeConfig) -> Context | None:
        assert config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self, config.cache)


class RuntimeConfig:
    def __init__(self, engine: Engine):
        self.engine = engine
        self.strategy: ExecutionContextAllocationStrategy | None = None
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.engine.events)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """What was compiled is the word "compiled", which the first run of an engine adds where it is not there."""

    def __init__(self, events: list[tuple[Any, ...]]):
        self.data, self.events = b"", events

    def deserialize(self, data: bytes) -> bool:
        fits = data == b"compiled"
        self.events.append(("taken" if fits else "rejected", data))
        if fits:
            self.data = data
        return fits

    def serialize(self) -> memoryview:
        return memoryview(self.data)


class Context:
    def __init__(self, engine: Engine, cache: RuntimeCache | None):
        self.engine, self.cache, self.at = engine, cache, dict[str, int]()
        self.scratch: tuple[int, int] | None = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.engine.events.append(("address", name, address))
        self.at[name] = address
        return name in self.engine.tensors

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = address, size
        self.engine.events.append(("scratch", address, size))

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.events.append(("execute", stream))
        if self.engine.description.get("fails"):
            return False
        if self.cache is not None and not self.cache.data:
            self.engine.events.append(("compile",))
            self.cache.data = b"compiled"
        if CudaGraph.recording is None:
            self.compute(dict(self.at))
        else:
            CudaGraph.recording.work.append(functools.partial(self.compute, dict(self.at)))
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.description.get("capturable", True)

    def compute(self, at: dict[str, int]) -> None:
        assert at.keys() == self.engine.tensors.keys(), "an address was never set"
        assert self.scratch is not None
        assert self.scratch[1] >= self.engine.device_memory_size_v2
        left, right = (self.read(at[name], name) for name in self.engine.description["product"])
        (name,) = self.engine.description["outputs"]
        made = (left @ right).contiguous()
        ctypes.memmove(at[name], made.data_ptr(), made.nbytes)

    def read(self, address: int, name: str) -> torch.Tensor:
        shape = self.engine.tensors[name]
        count = int(torch.tensor(shape).prod())
        return torch.frombuffer((ctypes.c_char * (4 * count)).from_address(address), dtype=torch.float32).reshape(shape)


class Library(ModuleType):
    def __init__(self) -> None:
        super().__init__("tensorrt_rtx")
        self.__version__ = VERSION
        self.events: list[tuple[Any, ...]] = []
        self.ILogger, self.TensorIOMode = ILogger, TensorIOMode
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def Runtime(self, logger: Any) -> Any:
        class Runtime:
            def deserialize_cuda_engine(_, data: bytes) -> Engine | None:
                if data.startswith(b"refused"):
                    logger.log(Severity.ERROR, "IRuntime::deserializeCudaEngine:\n a  reason")
                    logger.log(Severity.VERBOSE, "chatter")
                    return None
                return Engine(json.loads(data), self.events)

        return Runtime()


class Stream:
    """A stream that does all at once, and writes down which one waits for which."""

    def __init__(self, number: int, events: list[tuple[Any, ...]]):
        self.cuda_stream, self.events = number, events

    def wait_stream(self, other: Stream) -> None:
        self.events.append(("wait", self.cuda_stream, other.cuda_stream))


class CudaGraph:
    """What was enqueued while it was recorded, with the addresses of then."""

    recording: ClassVar[CudaGraph | None] = None

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for run in self.work:
            run()


@contextlib.contextmanager
def recorded(graph: CudaGraph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    stream.events.append(("record", stream.cuda_stream))
    CudaGraph.recording = graph
    try:
        yield
    finally:
        CudaGraph.recording = None


CALLERS, OWN = 7, 8
"""The numbers of torch's current stream and of the artifact's own."""


def install(patch: pytest.MonkeyPatch) -> Library:
    """The library under its name, and streams and CUDA graphs where torch on a CPU has none."""
    library = Library()
    patch.setitem(__import__("sys").modules, "tensorrt_rtx", library)
    patch.setattr(torch.cuda, "current_stream", lambda device: Stream(CALLERS, library.events))
    patch.setattr(torch.cuda, "Stream", lambda device: Stream(OWN, library.events))
    patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    patch.setattr(torch.cuda, "CUDAGraph", CudaGraph)
    patch.setattr(torch.cuda, "graph", recorded)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="a GPU"))
    return library
