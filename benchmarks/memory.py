"""What a second process costs: memory of one, two and more processes that have drawn a picture with the same artifact.

    python benchmarks/memory.py artifacts/flux-fast-shapes --processes 3

PSS (`/proc/PID/smaps_rollup`) counts a page by its share: one that two processes map is half of each. So the sum over all
processes is the memory that is really used, and how much the sum grows with one more process is what that process costs. What a process that only
imports torch, and ONNX Runtime for artifacts of it, costs is measured beside it, for it is most of it. The last column is what the weights add to that:
the growth with the artifact less the growth without, as a share of the weight files' size.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import figures

from prebake.runtime.manifest import read_manifest

DRAW_PROGRAM = """
import sys, torch
from prebake.runtime import load
torch.set_num_threads(1)
if sys.argv[2] == "onnxruntime":
    import onnxruntime
if sys.argv[1]:
    pipe = load(sys.argv[1], runners=1)
    for cache in (False, True):
        pipe("a red circle", seed=1, cache=cache, output_type="latent")
print("ready", flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    found = {"artifacts": [measure_memory(artifact, args.processes) for artifact in args.artifacts]}
    print(figures.memory_table(found))
    figures.save_figures(found, args.output)


def measure_memory(artifact: Path, processes: int) -> dict[str, Any]:
    """Bytes: of the weight files, and of the first process, what each further one adds, and what it adds without an artifact."""
    backend = read_manifest(artifact).backend
    empty, sums = measure_totals("", backend, processes), measure_totals(str(artifact), backend, processes)
    return {
        "artifact": artifact.name,
        "weights_bytes": weight_files_bytes(artifact),
        "first_bytes": sums[0],
        "further_bytes": increment_bytes(sums),
        "empty_bytes": increment_bytes(empty),
        "processes": processes,
    }


def weight_files_bytes(artifact: Path) -> int:
    return sum(file.stat().st_size for file in (artifact / "weights").iterdir())


def measure_totals(artifact: str, backend: str, count: int) -> list[int]:
    """PSS bytes of all processes together, with one of them up, with two, ..."""
    sums, held = [], []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            held.append(stack.enter_context(start_process(DRAW_PROGRAM, artifact, backend)))
            sums.append(sum(read_pss(process.pid) for process in held))
    return sums


def increment_bytes(sums: Sequence[int]) -> int:
    """What each process after the first adds."""
    return (sums[-1] - sums[0]) // (len(sums) - 1)


@contextlib.contextmanager
def start_process(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready, and waits."""
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the process ended early: {' '.join(command[:1] + command[3:])}")
            yield process
        finally:
            process.kill()


def read_pss(pid: int) -> int:
    """Bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
