"""Run as a process of its own: `python concurrent_unpacks.py PACKAGE CACHE` unpacks one package into one cache in eight processes at once,
again and again: into an empty cache, and into one whose entry is damaged. Prints what was not right, as JSON."""

import json
import multiprocessing
import shutil
import sys
import traceback
from pathlib import Path

from prebake.runtime.storage import unpack

PROCESSES, ROUNDS, SHA256 = 8, 20, "c0de"


def main(package: Path, cache: Path) -> dict:
    fork = multiprocessing.get_context("fork")
    members = unpack.read_members(str(package), package.read_bytes())
    wrong = fork.Manager().list()
    left = []
    for damaged in (False, True):
        for _ in range(ROUNDS):
            shutil.rmtree(cache, ignore_errors=True)
            if damaged:
                with unpack.unpack_members(members, SHA256, cache) as libraries:
                    next(iter(libraries.values())).write_bytes(b"half")
            barrier = fork.Barrier(PROCESSES)
            processes = [fork.Process(target=one, args=(members, cache, barrier, wrong)) for _ in range(PROCESSES)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            left += [p.name for p in cache.iterdir() if p.name != SHA256]
    return {"wrong": list(wrong), "left": left}


def one(members: dict, cache: Path, barrier, wrong) -> None:
    try:
        barrier.wait()
        with unpack.unpack_members(members, SHA256, cache) as libraries:
            for model, so in libraries.items():
                if so.read_bytes() != members[model][so.name] or not so.is_relative_to(cache):
                    wrong.append(f"{so} is not right")
    except BaseException:
        wrong.append(traceback.format_exc())


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
