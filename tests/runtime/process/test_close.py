"""A closed artifact: nothing of it is mapped or open, and whoever calls it is told in a sentence."""

import gc
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from prebake.runtime import RequestError, load
from prebake.runtime.process.fork import wait_for_exit
from support import fault_processes
from support.heap import heap_bytes


@pytest.fixture
def opened(artifact_copy, tmp_path):
    return load(artifact_copy, cache_dir=tmp_path / "cache", runners=1)


def maps_of(*folders):
    lines = Path("/proc/self/maps").read_text("utf-8").splitlines()
    return [line for line in lines if any(str(folder) in line for folder in folders)]


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    wait_for_exit(thread)


def draw(pipe, **arguments):
    return pipe("red", seed=1, output_type="pt", **arguments).images


def test_nothing_is_mapped_or_open_after_it(opened, artifact_copy, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    assert len(maps_of(artifact_copy)) > 0
    assert len(maps_of(tmp_path / "cache")) > 0
    in_a_thread(lambda: draw(opened))
    opened.close()
    assert maps_of(artifact_copy, tmp_path / "cache") == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_weights_are_unmapped_although_the_calling_thread_lives(opened, artifact_copy):
    draw(opened)
    opened.close()
    assert maps_of(artifact_copy) == []


def test_an_artifact_that_is_let_go_of_is_unmapped_too(artifact_copy, tmp_path):
    pipe = load(artifact_copy, cache_dir=tmp_path / "cache")
    draw(pipe)
    del pipe
    gc.collect()
    assert maps_of(artifact_copy) == []


def test_a_call_after_it_is_refused_and_closing_again_is_not(opened):
    opened.close()
    opened.close()
    assert opened.closed
    with pytest.raises(RequestError, match="it was closed; load it again"):
        draw(opened)
    with pytest.raises(RequestError, match="it was closed; load it again"):
        opened.artifact.graph("vae_decoder")({})
    assert "flux" in repr(opened)


def test_a_with_block_closes_whatever_ends_it(artifact_copy, cache_dir):
    with load(artifact_copy, cache_dir=cache_dir) as pipe:
        assert draw(pipe).shape[0] == 1
    assert pipe.closed
    with suppress(ZeroDivisionError), load(artifact_copy, cache_dir=cache_dir) as pipe:
        draw(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert pipe.closed


def test_a_call_at_work_ends_as_ever_and_those_that_wait_are_refused(opened):
    alone = draw(opened)
    begun, go, made, refused = threading.Event(), threading.Event(), [], []

    def wait(*_):
        begun.set()
        go.wait()

    def call(callback):
        try:
            made.append(draw(opened, callback_on_step_end=callback))
        except RequestError as e:
            refused.append(str(e))

    threads = [threading.Thread(target=call, args=(wait,))]
    threads[0].start()
    begun.wait()
    threads += [threading.Thread(target=call, args=(None,)), threading.Thread(target=opened.close)]
    for thread in threads[1:]:
        thread.start()
    while not opened.closed:
        pass
    call(None)  # during it
    go.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [torch.equal(picture, alone) for picture in made] == [True]
    assert len(refused) == 2
    assert all("it was closed" in words for words in refused)


def test_a_callback_cannot_close_its_own_call(opened):
    with pytest.raises(RequestError, match="closed by a callback of its own call"):
        draw(opened, callback_on_step_end=lambda pipe, *_: pipe.close())
    assert not opened.closed
    draw(opened)


def test_another_pipeline_of_the_same_artifact_goes_on(opened, artifact_copy, tmp_path):
    other = load(artifact_copy, cache_dir=tmp_path / "cache")
    want = draw(opened)
    opened.close()
    assert torch.equal(draw(other), want)


def test_a_server_reloads_a_replaced_artifact(artifact_copy, tmp_path):
    """The move that the how-to describes: the next one is loaded and takes the place, then the last is closed."""
    pipe = load(artifact_copy, cache_dir=tmp_path / "cache")
    want = draw(pipe)
    for _ in range(3):
        fresh = Path(shutil.copytree(artifact_copy, tmp_path / "fresh"))
        artifact_copy.rename(tmp_path / "old")
        fresh.rename(artifact_copy)
        shutil.rmtree(tmp_path / "old")
        last, pipe = pipe, load(artifact_copy, cache_dir=tmp_path / "cache")
        last.close()
        assert torch.equal(draw(pipe), want)
        assert [line for line in maps_of(tmp_path) if "(deleted)" in line] == []


def test_many_loads_leave_what_a_few_leave(toy_artifact, cache_dir):
    """In a process of its own, as a server has it: calls from threads that end."""
    said = fault_processes.script("many_loads.py", toy_artifact, cache_dir)
    assert said["maps"] == [said["maps"][0]] * 3
    assert said["descriptors"] == [said["descriptors"][0]] * 3
    assert said["artifact"] == 0


def test_a_load_leaves_little_on_the_heap(toy_artifact, cache_dir):
    """torch holds each tensor that it was ever bound to; without spare ones that is 8 KiB for each load of the toy."""

    def grown(loads):
        gc.collect()
        before = heap_bytes()
        for _ in range(loads):
            load(toy_artifact, cache_dir=cache_dir).close()
        gc.collect()
        return (heap_bytes() - before) / loads

    grown(5)
    assert grown(30) < 4096
