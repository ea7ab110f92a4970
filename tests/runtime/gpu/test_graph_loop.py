"""The recorded loop with a device that is played: what it records computes only when it is launched, from tensors where they
were then. The loop itself is the oracle."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from prebake.runtime import ArtifactError
from prebake.runtime.gpu import graph_loop as recorded
from prebake.runtime.gpu.graph_loop import MAX_RECORDINGS, RecordedLoop, loop_of
from prebake.runtime.replay import replay, tabulate_plan
from support.recorded_loop import (
    EULER,
    SITES,
    VARIANTS,
    Device,
    call,
    tables,
    through,
)


def test_a_recorded_loop_gives_what_the_loop_gives():
    device = Device()
    loop = RecordedLoop(device.record)
    made = [through(loop, seed) for seed in range(5)]
    assert all(torch.equal(x, through(replay, seed)) for seed, x in enumerate(made))
    assert len({float(x.sum()) for x in made}) == 5  # and no call's result was overwritten by a later one
    assert (device.recorded, device.launched) == (1, 4)  # the first call is the plain loop


def test_what_was_recorded_reads_its_own_tensors_not_the_callers():
    """The canary: launched without the copies, a recording would repeat the call that it was made in."""
    device = Device()
    loop = RecordedLoop(device.record)
    through(loop, 0), through(loop, 1)
    (recording,) = loop._recordings.values()
    recording.launch()
    assert torch.equal(recording.made, through(replay, 1))
    assert not torch.equal(recording.made, through(replay, 2))


def test_each_plan_has_its_recording_and_equal_plans_share_one():
    device = Device()
    loop = RecordedLoop(device.record)
    other = tables("other", second=EULER)
    for seed in range(3):
        assert torch.equal(through(loop, seed, tables()), through(replay, seed, tables()))  # made anew, and equal
        assert torch.equal(through(loop, seed, other), through(replay, seed, other))
    assert device.recorded == 2


def test_a_call_that_looks_at_each_step_is_not_recorded():
    device = Device()
    loop = RecordedLoop(device.record)
    seen = []
    for seed in range(3):
        got = through(loop, seed, on_evaluation=lambda e, output, latents: seen.append(e))
        assert torch.equal(got, through(replay, seed))
    assert seen == [0, 1, 2] * 3
    assert device.recorded == 0


def test_recordings_that_were_used_longest_ago_are_let_go_of():
    device = Device()
    loop = RecordedLoop(device.record)
    plans = [tables(str(i)) for i in range(MAX_RECORDINGS + 1)]
    for over in plans:
        through(loop, 0, over), through(loop, 1, over)
    assert len(loop._recordings) == MAX_RECORDINGS
    before = device.recorded
    through(loop, 0, plans[-1])
    assert device.recorded == before
    through(loop, 0, plans[0]), through(loop, 0, plans[0])
    assert device.recorded == before + 1


def test_threads_do_not_meet_in_a_recording():
    loop = RecordedLoop(Device().record)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda seed: through(loop, seed), range(40)))
    assert all(torch.equal(x, through(replay, seed)) for seed, x in enumerate(made))


def test_a_recording_that_fails_leaves_the_next_call_to_try_again():
    device = Device()

    def fails_once(work):
        device.recorded += 1
        if device.recorded == 1:
            raise RuntimeError("the stream does not record this")
        return device.record(work)

    loop = RecordedLoop(fails_once)
    through(loop, 0)
    with pytest.raises(ArtifactError, match=r"could not record plan 'p' \(the stream.*export again"):
        through(loop, 1)
    assert torch.equal(through(loop, 2), through(replay, 2))


@pytest.mark.parametrize(
    ("backend", "device", "options", "is_recorded"),
    [
        ("aoti", "cuda", {"cuda_graphs": True}, True),
        ("aoti", "cuda", {"cuda_graphs": False}, False),
        ("aoti", "cuda", {}, False),
        ("aoti", "cpu", {"cuda_graphs": True}, False),
        ("tensorrt", "cuda", {"cuda_graphs": True}, False),
    ],
)
def test_the_recipe_asks_for_it(backend, device, options, is_recorded):
    requires = SimpleNamespace(device=device)
    manifest = SimpleNamespace(recipe={"compile": {"options": options}}, backend=backend, requires=requires)
    assert isinstance(loop_of(manifest), RecordedLoop) is is_recorded


@pytest.mark.gpu
def test_a_trajectory_is_one_launch_on_a_gpu():
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.device("cuda")
    inputs, latents, noise = call(0)
    there = {n: t.to(gpu) for n, t in inputs.items()}, latents.to(gpu), [z.to(gpu) for z in noise]
    over = tabulate_plan(tables().plan, gpu, 0.001)
    loop = RecordedLoop(recorded.record_cuda_graph)

    def run():
        return loop(over, VARIANTS, SITES, there[0], there[1], noise=there[2])

    run(), run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        made = run()
    names = [e.key for e in profiled.key_averages() for _ in range(e.count)]
    assert names.count("cudaGraphLaunch") == 1
    assert not [n for n in names if "DtoH" in n or ("Synchronize" in n and "Device" not in n)]
    # the same kernels in the same order
    assert torch.equal(made, replay(over, VARIANTS, SITES, there[0], there[1], noise=there[2]))
