"""Many threads on one artifact: bounded, first come first served, cancelled, and nothing left behind."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from prebake.runtime import Cancelled, RequestError, load, memory, runners
from prebake.runtime.backends import aoti
from prebake.runtime.runners import Runners
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # last, since its modules have short names
import soak

SOON_S = 20  # a thread that takes longer hangs


def started(*works):
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    return threads


def joined(threads):
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()


@pytest.fixture
def opened(toy_artifact, cache_dir):
    return lambda runners=None: load(toy_artifact, cache_dir=cache_dir, runners=runners)


# --- the same pictures, however many ask ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("runners", [1, 3])
def test_threads_get_what_they_would_get_alone(opened, runners):
    pipe = opened(runners)
    asked = soak.make_requests(pipe, 64)
    assert {r.kind for r in asked} == set(soak.REQUEST_KINDS) - {"picture"}
    alone = [soak.answer_request(pipe, r) for r in asked]
    got = {}
    soak.serve_requests(pipe, iter(enumerate(asked)), 8, got.__setitem__)
    assert [i for i, want in enumerate(alone) if not soak.is_same_answer(got[i], want)] == []
    assert pipe.artifact.runners.free == runners
    pictures = [a for a in alone if isinstance(a, torch.Tensor)]
    assert len(pictures) > 30
    assert not soak.is_same_answer(pictures[0], pictures[1])  # they are not all the same
    assert {a for a in alone if isinstance(a, str)} == {"Cancelled", "CallbackError", "RequestError"}


def test_torchs_own_runner_gives_the_same_bits(opened, monkeypatch):
    """What runs libraries of an older torch, or with operators that only torch's dispatcher has."""
    ours = opened()
    assert all(graph._model._container for graph in ours.artifact.graphs.values())
    monkeypatch.setattr(aoti, "open_container", lambda *arguments: None)
    theirs = opened()
    for cache in (True, False):
        call = {"prompt": "red circle", "seed": 7, "cache": cache, "output_type": "pt"}
        assert torch.equal(ours(**call).images, theirs(**call).images)


# --- no more than there are runners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("runners", [1, 3])
def test_as_many_calls_are_at_work_as_there_are_runners(opened, runners):
    pipe, lock, now, most = opened(runners), threading.Lock(), [0], [0]
    meet = threading.Barrier(runners)  # is only passed by that many at once

    def callback(p, step, *_):
        if step == 0:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            meet.wait(SOON_S)
        if step == 3:
            with lock:
                now[0] -= 1
        return {}

    joined(started(*[lambda: pipe("red", seed=1, callback_on_step_end=callback)] * (2 * runners)))
    assert most == [runners]


def test_those_who_wait_are_served_in_turn():
    runners, order, ready = Runners(1), [], []

    def work(i):
        with runners.one():
            order.append(i)

    with runners.one():
        for i in range(5):
            ready += started(lambda i=i: work(i))
            until(lambda i=i: len(runners._waiting) == i + 1)
    joined(ready)
    assert order == [0, 1, 2, 3, 4]
    assert runners.free == 1


def until(true):
    end = time.monotonic() + SOON_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_callback_may_call_the_pipeline_again(opened):
    pipe, inner = opened(1), []
    want = pipe("blue", seed=2, output_type="latent").images

    def callback(p, step, *_):
        inner.append(p("blue", seed=2, output_type="latent").images)
        return {}

    joined(started(lambda: pipe("red", seed=1, callback_on_step_end=callback)))
    assert len(inner) == 4
    assert all(torch.equal(x, want) for x in inner)
    assert pipe.artifact.runners.free == 1


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_a_number_of_runners_that_is_none_is_refused(opened, count):
    with pytest.raises(RequestError, match=r"^runners(=-?\d|: expected a whole number, got )"):
        opened(count)


# --- cancelled, failed, interrupted -----------------------------------------------------------------------------------


def test_another_thread_cancels_a_call_between_steps(opened):
    pipe, cancel, steps, caught = opened(1), threading.Event(), [], []
    seen, go_on = threading.Event(), threading.Event()

    def callback(p, step, *_):
        steps.append(step)
        if step == 1:
            seen.set()
            go_on.wait(SOON_S)
        return {}

    def work():
        try:
            pipe("red", seed=1, num_images_per_prompt=3, callback_on_step_end=callback, cancel=cancel)
        except Cancelled as e:
            caught.append(str(e))

    threads = started(work)
    assert seen.wait(SOON_S)
    cancel.set()
    go_on.set()
    joined(threads)
    assert caught == ["the call was cancelled by its `cancel`"]
    assert steps == [0, 1]
    assert pipe.artifact.runners.free == 1
    assert len(pipe("red", seed=1, cancel=threading.Event()).images) == 1


def test_a_call_is_cancelled_before_it_begins_and_while_it_waits(opened):
    pipe, cancel, caught = opened(1), threading.Event(), []

    def work():
        with pytest.raises(Cancelled):
            pipe("red", seed=1, cancel=cancel)
        caught.append(True)

    with pipe.artifact.runners.one():
        threads = started(work)
        until(lambda: len(pipe.artifact.runners._waiting) == 1)
        assert not caught
        cancel.set()
        joined(threads)  # though the runner is still taken
    with pytest.raises(Cancelled):
        pipe("red", seed=1, cancel=cancel)
    assert caught
    assert pipe.artifact.runners.free == 1
    assert not pipe.artifact.runners._waiting


def test_a_runner_that_is_handed_to_a_cancelled_call_goes_to_the_next():
    """The flag is looked at as often as the hand-over happens, so that they meet."""
    runners = Runners(1)
    for _ in range(20):
        cancels = [threading.Event() for _ in range(8)]

        def work(cancel):
            try:
                with runners.one(cancel):
                    time.sleep(0.001)
            except Cancelled:
                pass

        with runners.one():
            threads = started(*[lambda c=c: work(c) for c in cancels])
            time.sleep(0.002)
            for cancel in cancels[::2]:
                cancel.set()
        joined(threads)
        assert (runners.free, len(runners._waiting)) == (1, 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_runner_is_given_back_whatever_ends_the_call(opened, error):
    pipe = opened(2)

    def callback(*_):
        raise error

    for _ in range(5):
        with pytest.raises(error):
            pipe("red", seed=1, callback_on_step_end=callback)
        with pytest.raises(RequestError):
            pipe("red", latents=torch.zeros(1))
    assert pipe.artifact.runners.free == 2


# --- what the soak calls flat ------------------------------------------------------------------------------------------


def test_flat_samples_are_flat_and_a_leak_is_not():
    def samples(leak):
        scatter = (0, 3, 1, 2)
        return [
            soak.MemorySample(5.0 * i, 100 * i, (200 << 20) + (scatter[i % 4] << 20) + leak * i, 0, 100 << 20, 6, 11)
            for i in range(60)
        ]

    assert soak.growth_problems(samples(0)) == []
    assert soak.growth_problems(samples(1 << 20))[0].startswith("rss grew by 2")
    lost = [soak.MemorySample(**{**vars(s), "descriptors": 6 + i}) for i, s in enumerate(samples(0))]
    assert soak.growth_problems(lost) == ["descriptors rose to 65"]
    assert json.dumps(vars(soak.take_sample(0.0, 0)))


# --- memory of calls that have ended ----------------------------------------------------------------------------------


@pytest.fixture
def trims(monkeypatch):
    """How often freed memory was given back; here every call is a long one."""
    seen = []
    monkeypatch.setattr(runners, "LONG_CALL_S", 0)
    monkeypatch.setattr(runners, "trim_heap", lambda: seen.append(1))
    return seen


def test_freed_memory_is_given_back_when_the_last_call_ends(trims):
    some = Runners(2)
    with some.one():
        with some.one():  # as a callback that calls the pipeline again
            pass
        assert trims == []
    assert trims == [1]


def test_it_is_not_given_back_while_others_work_or_after_short_calls(trims, monkeypatch):
    some, inside, go = Runners(2), threading.Event(), threading.Event()

    def work():
        with some.one():
            inside.set()
            go.wait(SOON_S)

    other = started(work)
    assert inside.wait(SOON_S)
    with some.one():
        pass
    assert trims == []
    monkeypatch.setattr(runners, "LONG_CALL_S", SOON_S)
    go.set()
    joined(other)
    assert trims == []


def test_what_the_allocator_keeps_goes_back_to_the_system():
    """Blocks that are freed below one that is not stay with the process until then."""
    blocks = [bytearray(64 << 10) for _ in range(1000)]
    whole = private_bytes()
    del blocks[:-1]
    kept = private_bytes()
    memory.trim_heap()
    assert kept > whole - (16 << 20)
    assert private_bytes() < whole - (48 << 20)
    assert len(blocks) == 1


def private_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty:"))
