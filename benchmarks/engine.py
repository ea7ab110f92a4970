"""What the engine adds to an evaluation: microseconds of an entry whose graph costs nothing, beside the same entry in the plain loop.

    python benchmarks/engine.py ARTIFACT [--output FILE]

The denoiser's graphs give the same tensors at every call, so what is left is the loop's own work: in `replay` inputs, updates and
stored values; in the engine besides that which job goes on, its costs and its bookkeeping. Jobs are there all at once, as many as said.
Times are the process's CPU time, so that what else the machine does is not in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import prebake
from prebake.runtime.call.batches import split_pictures
from prebake.runtime.engine.engine import Engine
from prebake.runtime.replay import DenoiserVariant

JOBS = (1, 16, 128)
ROUNDS = 5


def constant(variant: DenoiserVariant) -> DenoiserVariant:
    """The variant with zeros for an answer, at no cost."""
    outputs = {s.name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in variant.graph.outputs}

    def call(_: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return outputs

    return DenoiserVariant(variant.graph, call)


def loop_us(pipe: Any, steps: int) -> float:
    """Of one evaluation in the plain loop, the call around it left out."""
    graphs, request = pipe._graphs, pipe._reader.read({"prompt": "red"}, seed=0, output_type="latent")
    with torch.no_grad():
        start = graphs.begin(request)
        (pictures,) = split_pictures(1, (1,))
        group = graphs.group(request, start, pictures)
        began = time.process_time()
        pipe._loop(group.tables, group.variants, graphs.sites, group.inputs, group.latents, noise=group.noise)
        return (time.process_time() - began) / steps * 1e6


def engine_us(pipe: Any, jobs: int, steps: int) -> float:
    """Of one evaluation in the engine, with as many jobs at once; openings are left out."""
    with Engine(pipe) as engine:
        engine._graphs.variants[1] = pipe._graphs.variants[1]
        with engine._changed:  # nothing begins before all are here
            pending = [engine.submit("red", seed=i, output_type="latent") for i in range(jobs)]
            for job in engine._jobs:
                engine._open(job)
                job.take_off("opening")
            began = time.process_time()
        for each in pending:
            each.result()
        return (time.process_time() - began) / (jobs * steps) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = prebake.load(args.artifact, runners=1)
    pipe._graphs.variants[1] = {name: constant(v) for name, v in pipe._graphs.variants[1].items()}
    steps = len(pipe.artifact.plans[str(pipe.steps[0])].evaluations)
    figures = {"evaluations": steps, "loop_us": round(median(loop_us(pipe, steps) for _ in range(ROUNDS * 4)), 1)}
    figures |= {f"engine_{n}_us": round(median(engine_us(pipe, n, steps) for _ in range(ROUNDS)), 1) for n in JOBS}
    print(json.dumps(figures, indent=1))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
