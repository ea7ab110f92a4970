"""Run as a process of its own: `python memory_limits.py LARGE SMALL CACHE` loads two artifacts with ever more address space left
(RLIMIT_AS): one whose weights are large, so that these do not fit, and a small one, which fails elsewhere. Prints what was said at each, what is still held after it, and whether a load without a limit
is right after all of them, as JSON."""

import faulthandler
import gc
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch

from prebake.runtime import load

MIB = 1 << 20


def main(large: Path, small: Path, cache: Path) -> dict:
    faulthandler.dump_traceback_later(300, exit=True)  # a load that never ends says where it is
    expected = [latents(artifact, cache) for artifact in (large, small)]
    limits = [(large, spare * MIB) for spare in range(0, 50, 5)] + [(small, spare * MIB // 2) for spare in range(14)]
    loads = [one(artifact, cache / f"{spare}", spare) for artifact, spare in limits]
    again = [latents(artifact, cache) for artifact in (large, small)]
    return {"loads": loads, "right again": all(map(torch.equal, again, expected))}


def latents(artifact: Path, cache: Path) -> torch.Tensor:
    return load(artifact, cache_dir=cache)("a red circle", seed=7, output_type="latent")[0]


def one(artifact: Path, cache: Path, spare: int) -> dict:
    """What comes of a load that may have `spare` bytes more than this process has. `error` is None where it worked."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = held(artifact)
    said, error, cause = "", None, ""
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))
    try:
        load(artifact, cache_dir=cache)
    except Exception as e:
        said, error, cause = str(e), type(e).__name__, repr(e.__cause__)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    gc.collect()
    now = held(artifact) - before
    return {
        "spare": spare,
        "error": error,
        "said": said.replace(str(artifact), "ARTIFACT"),
        "cause": cause,
        "held": sorted(now),
    }


def held(artifact: Path) -> set[str]:
    """What this process has of artifacts: open files, mapped weights, threads; and what it has left among temporary files."""
    files = {f"open {os.readlink(p)}" for p in Path("/proc/self/fd").iterdir() if p.is_symlink()}
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {f"mapped {line.split()[-1]}" for line in maps if str(artifact) in line}
    temporary = {f"left {p}" for p in Path(tempfile.gettempdir()).iterdir()}
    return files | mapped | temporary | {f"{len(os.listdir('/proc/self/task'))} threads"}


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
