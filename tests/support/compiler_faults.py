"""Run as a process of its own: `python compiler_faults.py WORK WHAT` compiles a graph of two operators by AOTInductor. `none`: without a
compiler. `killed`: a child that is killed while the compiler runs, and another that compiles the same at once, while what was
killed leaves its compiler running. Prints what came of it, as JSON."""

import hashlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.lower import aoti
from prebake.runtime.errors import ExportError


class Toy(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return (torch.relu(x * self.factor) + 1,)


def compiled(folder: Path, factor: float) -> dict[str, str]:
    graph = capture_graph("toy", Toy(factor), (torch.ones(64, 64),), ("x",), ("y",))
    files = aoti.compile_graph(graph, {**aoti.PACKAGE_FLAGS, "cpp.threads": 1}, folder)
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


def none(work: Path) -> str:
    os.environ["PATH"] = str(work)
    try:
        compiled(work / "build", 2.0)
    except ExportError as e:
        return str(e)
    return "it was compiled"


def killed(work: Path) -> dict:
    expected = in_child(partial(compiled, work / "build", 2.0))
    other = begun(partial(compiled, work / "build", 3.0))  # another graph, so that its code would be seen
    compiler = wait_for_compiler(other)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    got = in_child(partial(compiled, work / "build", 2.0))
    return {"compiler": compiler, "same": got == expected, "files": sorted(got)}


def begun(work) -> int:
    if (child := os.fork()) == 0:
        work()
        os._exit(0)
    return child


def in_child(work) -> dict:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, json.dumps(work()).encode())
        os._exit(0)
    os.close(write)
    with open(read) as file:
        result = json.load(file)
    os.waitpid(child, 0)
    return result


def wait_for_compiler(parent: int) -> str:
    """The name of the compiler proper, as soon as one runs below the process."""
    for _ in range(60_000):
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, rest = status.read_text().split("(", 1)[1].rsplit(")", 1)
            except (OSError, IndexError):
                continue
            if name == "cc1plus" and parent in ancestors(int(rest.split()[1])):
                return name
        time.sleep(0.01)
    raise AssertionError("no compiler was begun")


def ancestors(process: int) -> set[int]:
    found = set()
    while process > 1:
        found.add(process)
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            break
    return found


if __name__ == "__main__":
    print(json.dumps({"none": none, "killed": killed}[sys.argv[2]](Path(sys.argv[1]))))
