"""Calls in forked processes, where torch has two threads: `forked_calls.py ARTIFACT CACHE` prints what came of each as JSON.

The toy is too small for parallel loops, so every call has a callback with a loop large enough: without a thread of its own, a
forked process waits there for ever, as it does in the loops of a real model.
"""

import json
import os
import select
import signal
import sys
import threading
from multiprocessing import get_context

import torch

from prebake.runtime import load
from prebake.runtime.process.usage import Usage

HANGS_S = 10


def parallel_loop(pipe, step, timestep, tensors):
    tensors["latents"].add_((torch.ones(1 << 20) + 1).sum().item() * 1e-9)
    return tensors


def draw(pipe, callback=parallel_loop):
    return pipe("red", seed=7, output_type="pt", callback_on_step_end=callback).images.tolist()


def in_child(work):
    """What `work` returns in a forked process, its error, or "hangs"."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        answer_to(write, work)
    os.close(write)
    ready, _, _ = select.select([read], [], [], HANGS_S)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read) as answer:
        return json.loads(answer.read() or '"hangs"')


def answer_to(write, work):
    try:
        said = work()
    except BaseException as e:
        said = f"{type(e).__name__}: {e}"
    os.write(write, json.dumps(said).encode())
    os._exit(0)


def with_a_thread_at_work(pipe):
    """A fork while another thread is in a call."""
    begun, go = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        go.wait()

    thread = threading.Thread(target=draw, args=(pipe, wait))
    thread.start()
    begun.wait()
    said = in_child(lambda: draw(pipe))
    go.set()
    thread.join()
    return said


def out_of_a_callback(pipe):
    """A fork in a callback, and the call goes on in both processes."""
    read, write = os.pipe()
    made = []

    def fork(*_):
        if not made:
            made.append(os.fork())

    try:
        said = draw(pipe, fork)
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    if made == [0]:
        answer_to(write, lambda: said)
    os.waitpid(made[0], 0)
    return json.loads(os.read(read, 1 << 20))


def main():
    torch.set_num_threads(2)
    pipe = load(sys.argv[1], cache_dir=sys.argv[2], runners=1)
    alone = draw(pipe)
    said = {
        "child": in_child(lambda: draw(pipe) == alone),
        "grandchild": in_child(lambda: [draw(pipe) == alone, in_child(lambda: draw(pipe) == alone)]),
        "error": in_child(lambda: draw(pipe, lambda *_: 1 / 0)),
        "loaded after": in_child(lambda: draw(load(sys.argv[1], cache_dir=sys.argv[2])) == alone),
        "graph": in_child(lambda: pipe.artifact.graph("vae_decoder")({})),
        "at work": with_a_thread_at_work(pipe),
        "in a callback": out_of_a_callback(pipe),
    }
    process = get_context("fork").Process(target=lambda: sys.exit(draw(pipe) != alone), daemon=True)
    process.start()
    process.join(HANGS_S)
    said["multiprocessing"] = process.exitcode == 0
    usage = Usage("x", forkable=False)
    said["not forkable"] = in_child(usage.refuse_unusable)
    said["parent"] = draw(pipe) == alone
    print(json.dumps(said))


if __name__ == "__main__":
    main()
