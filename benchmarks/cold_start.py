"""From nothing to the first picture: an artifact, its pipeline in diffusers, and that with torch.compile, in fresh processes.

    python benchmarks/cold_start.py artifacts/flux-fast-shapes --runs 3

The stages are those of `prebake bench` (docs/how-to/bench.md): the interpreter, imports, loading, the first picture. Processes take
turns, artifact, eager, compiled, artifact, ...; a ratio is the median of the turns' own ratios. Exit code 1 where an
artifact takes more than 0.5 of the eager pipeline's time, or more than 0.05 of the compiled one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import figures
import torch

from prebake.exporter.bench.cold_start import STAGES, StartTimes, measure_cold_start
from prebake.exporter.bench.rounds import BenchOptions, BenchSubject, artifact_start, baseline_starts, read_subjects
from prebake.exporter.load.prompts import picture_prompts

GOALS = {"eager": 0.5, "compile": 0.05}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", help="the pipeline, where the manifest has only its name")
    parser.add_argument("--baseline", default="eager,compile", help="what to compare with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    baselines = tuple(args.baseline.split(","))
    choices = BenchOptions(baselines=baselines, cold_runs=args.runs, model=args.model, threads=args.threads)
    artifacts = []
    for folder in args.artifacts:
        (subject,) = read_subjects([folder], choices)
        runs = {n: [dataclasses.asdict(s) for s in starts] for n, starts in time_turns(subject, choices).items()}
        artifacts.append({"name": subject.label, "runs": runs})
    found = {"artifacts": artifacts, "stages": STAGES}
    print(figures.cold_start_table(found))
    figures.save_figures(found, args.output)
    return any(figures.baseline_share(a, b) > goal for a in artifacts for b, goal in GOALS.items() if b in a["runs"])


def time_turns(subject: BenchSubject, choices: BenchOptions) -> dict[str, list[StartTimes]]:
    """The cold starts by name of what was started, the artifact first."""
    prompt = picture_prompts(subject.recipe)[0]
    starts = [artifact_start(subject, prompt), *baseline_starts(subject, prompt, choices)]
    names = [subject.label, *choices.baselines]
    found: dict[str, list[StartTimes]] = {name: [] for name in names}
    for _ in range(choices.cold_runs):
        for name, start in zip(names, starts, strict=True):
            found[name].append(measure_cold_start(start))
    return found


if __name__ == "__main__":
    sys.exit(main())
