"""The reader of profiles, on one made by hand and one made on a CPU: what it finds on a GPU is tested in test_on_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from support.gpu_trace import ALLOCATES, LAUNCHES, began, count, events_of, waits


def called(name: str, ts: float, correlation: int = 0, cat: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": 1.0, "args": {"correlation": correlation}}


def copied(kind: str, ts: float, correlation: int) -> dict[str, Any]:
    return called(f"Memcpy {kind}", ts, correlation, "gpu_memcpy")


QUIET = [
    called("cudaMemcpyAsync", 5, 1),
    called("cudaStreamSynchronize", 6),  # before the loop
    called("cudaMemcpyAsync", 10, 2),
    copied("DtoD (Device -> Device)", 30, 2),
    called("cudaGraphLaunch", 11, 3),
    called("cudaLaunchKernel", 12, 4),
    called("cudaMemcpyAsync", 50, 5),  # after the decode began, though the GPU is not done with the loop
    copied("DtoH (Device -> Pageable)", 55, 5),
    copied("DtoH (Device -> Pageable)", 20, 1),  # in the loop's time on the GPU, asked for before
    called("aten::copy_", 13, 9, "cpu_op"),
    called("cudaDeviceSynchronize", 60),
]


def test_a_trajectory_that_only_queues_work_waits_for_nothing():
    assert waits(QUIET, 10, 50) == []
    assert count(QUIET, 10, 50, LAUNCHES) == 2
    assert count(QUIET, 10, 50, ("cudaGraphLaunch",)) == 1
    assert count(QUIET, 10, 50, ALLOCATES) == 0


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ([called("cudaStreamSynchronize", 20)], ["cudaStreamSynchronize"]),
        ([called("cudaEventSynchronize", 10)], ["cudaEventSynchronize"]),
        ([called("cuCtxSynchronize", 49.9, cat="cuda_driver")], ["cuCtxSynchronize"]),
        # pinned, so that the call itself returns at once; done on the GPU long after the decode began
        (
            [called("cudaMemcpyAsync", 20, 7), copied("DtoH (Device -> Pinned)", 99, 7)],
            ["Memcpy DtoH (Device -> Pinned)"],
        ),
        ([called("cudaMemcpyAsync", 20, 7), copied("HtoD (Pinned -> Device)", 25, 7)], []),
        ([called("cudaStreamSynchronize", 50)], []),
    ],
)
def test_waits_and_copies_to_the_host_are_found_by_when_they_were_asked_for(more, found):
    assert waits([*QUIET, *more], 10, 50) == found


def test_spans_of_a_real_profile_are_found(tmp_path):
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with record_function("test: loop"):
            torch.ones(8) + 1
        with record_function("test: decode"):
            torch.ones(8).sum()
    events = events_of(profiled, tmp_path)
    assert began(events, "test: loop") < began(events, "test: decode")
    assert waits(events, began(events, "test: loop"), began(events, "test: decode")) == []  # nor is there a GPU
    with pytest.raises(ValueError, match="not enough values"):
        began(events, "test: nothing")
