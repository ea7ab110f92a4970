"""From nothing to the first picture: an artifact, its pipeline in diffusers, and that with torch.compile, in fresh processes.

    python benchmarks/cold_start.py artifacts/flux-fast-shapes --runs 3

The stages are those of `prebake bench` (docs/bench.md): the interpreter, imports, loading, the first picture. Processes take
turns, artifact, eager, compiled, artifact, ...; a ratio is the median of the turns' own ratios. Exit code 1 where an
artifact takes more than 0.5 of the eager pipeline's time, or more than 0.05 of the compiled one's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from prebake.exporter.bench import Choices, Subject, artifact_start, baseline_starts, read
from prebake.exporter.cold import STAGES, Started, started
from prebake.exporter.quality import picture_prompts

GOALS = {"eager": 0.5, "compile": 0.05}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", help="the pipeline, where the manifest has only its name")
    parser.add_argument("--baseline", default="eager,compile", help="what to compare with")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    baselines = tuple(args.baseline.split(","))
    missed = False
    print(f"| seconds | {' | '.join(STAGES)} | total | second image | of eager | of compiled |")
    print(f"| --- |{' ---: |' * (len(STAGES) + 4)}")
    for folder in args.artifacts:
        choices = Choices(baselines=baselines, cold_runs=args.runs, model=args.model, threads=args.threads)
        (subject,) = read([folder], choices)
        missed |= report(subject, choices, turns(subject, choices))
    return missed


def turns(subject: Subject, choices: Choices) -> dict[str, list[Started]]:
    """By name of what was started: the artifact first."""
    prompt = picture_prompts(subject.recipe)[0]
    starts = [artifact_start(subject, prompt), *baseline_starts(subject, prompt, choices)]
    names = [subject.label, *choices.baselines]
    found: dict[str, list[Started]] = {name: [] for name in names}
    for _ in range(choices.cold_runs):
        for name, start in zip(names, starts, strict=True):
            found[name].append(started(start))
    return found


def report(subject: Subject, choices: Choices, found: dict[str, list[Started]]) -> bool:
    """Prints a row for each, and returns whether the artifact missed a goal."""
    ratios = {
        name: statistics.median(a.total / b.total for a, b in zip(found[subject.label], found[name], strict=True))
        for name in choices.baselines
    }
    for name, runs in found.items():
        stages = [statistics.median(run.seconds[stage] for run in runs) for stage in STAGES]
        figures = [
            *stages,
            statistics.median(run.total for run in runs),
            statistics.median(r.second_image for r in runs),
        ]
        own = [f"{ratios[b]:.3f}" if name == subject.label and b in ratios else "" for b in GOALS]
        print(f"| {name} | {' | '.join([*(f'{s:.2f}' for s in figures), *own])} |", flush=True)
    return any(ratio > GOALS[name] for name, ratio in ratios.items() if name in GOALS)


if __name__ == "__main__":
    sys.exit(main())
