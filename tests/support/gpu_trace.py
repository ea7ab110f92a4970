"""What a profile says of a stretch of time on a GPU. In: the events of `torch.profiler`'s trace, in the format of Chrome's trace
viewer, times in microseconds. Out: the calls by which the host waited for the GPU, or had something copied from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]
CALLS = ("cuda_runtime", "cuda_driver")
"""Categories of what the host calls; what the GPU then does has the same `correlation`."""
SYNCHRONIZE = "ynchronize"  # cudaStreamSynchronize, cuCtxSynchronize
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
ALLOCATES = ("cudaMalloc", "cudaFree", "cuMemCreate", "cuMemAlloc")


def events_of(profiled: Any, folder: Path) -> list[Event]:
    """Of a `torch.profiler.profile` that has ended, all that have a length."""
    profiled.export_chrome_trace(str(folder / "trace.json"))
    trace = json.loads((folder / "trace.json").read_text("utf-8"))
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def began(events: Sequence[Event], name: str) -> float:
    """When the one `torch.profiler.record_function` of that name began on the host. Raises ValueError unless there is one."""
    (event,) = [e for e in events if e["name"] == name and str(e.get("cat")) in ("user_annotation", "cpu_op")]
    return event["ts"]


def calls(events: Sequence[Event], begin: float, end: float) -> list[Event]:
    """What the host called of CUDA from `begin` on and before `end`."""
    return [e for e in events if e.get("cat") in CALLS and begin <= e["ts"] < end]


def waits(events: Sequence[Event], begin: float, end: float) -> list[str]:
    """Calls that wait for the GPU, and copies to the host, whose call may return before: whoever reads them waits."""
    to_host = {
        e["args"]["correlation"]: e["name"] for e in events if e.get("cat") == "gpu_memcpy" and "DtoH" in e["name"]
    }
    found = []
    for event in calls(events, begin, end):
        copied = to_host.get(event.get("args", {}).get("correlation"))
        if SYNCHRONIZE in event["name"] or copied:
            found.append(copied or event["name"])
    return found


def count(events: Sequence[Event], begin: float, end: float, names: tuple[str, ...]) -> int:
    """How many calls begin with one of the names."""
    return sum(e["name"].startswith(names) for e in calls(events, begin, end))
