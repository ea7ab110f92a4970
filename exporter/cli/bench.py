"""`prebake bench`: times artifacts and baselines side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import add_output_modes, parse_positive, progress_mode

BASELINE_NAMES = ("eager", "eager-bf16", "compile", "compile-bf16")  # as bench.BASELINES, which imports torch


def add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="time artifacts side by side, with diffusers beside them if asked for",
        description="Draws the same pictures with every plan of every artifact in turn, and says how long pictures, the denoiser "
        "in them, and starts of a fresh process take. A ratio is given only where the times can be told apart.",
    )
    parser.add_argument(
        "artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="artifact folders, all of one model"
    )
    parser.add_argument(
        "--baseline",
        type=parse_baselines,
        default=(),
        metavar="NAME,...",
        help=f"time diffusers too, and if eager is among them against that: {', '.join(BASELINE_NAMES)}",
    )
    parser.add_argument("--runs", type=parse_runs, default=7, metavar="N", help="rounds, 2 or more (default: 7)")
    parser.add_argument("--steps", type=parse_positive, metavar="N", help="only the plans of so many steps")
    parser.add_argument("--threads", type=parse_positive, metavar="N", help="torch's threads (default: its own choice)")
    parser.add_argument(
        "--model",
        metavar="ID|FOLDER|shapes",
        help="where the pipeline is, if not where the manifest says; with --baseline, or an attached artifact",
    )
    cold = parser.add_mutually_exclusive_group()
    cold.add_argument(
        "--cold-runs",
        type=parse_positive,
        default=3,
        metavar="N",
        help="fresh processes for each cold start (default: 3)",
    )
    cold.add_argument("--no-cold", action="store_true", help="leave cold starts out")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON report there as well")
    add_output_modes(parser, json_result="the report with every sample as JSON")
    parser.set_defaults(run=_bench)


def parse_baselines(text: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in BASELINE_NAMES]:
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(BASELINE_NAMES)}, got {unknown[0]!r}")
    return names


def parse_runs(text: str) -> int:
    number = parse_positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, since one has no spread, got {number}")
    return number


def _bench(args: argparse.Namespace) -> int:
    from ...runtime.manifest import ATTACH_FAMILY, read_manifest
    from ..bench import report as bench_report
    from ..bench.rounds import BenchOptions, run_bench
    from ..progress import open_progress
    from ..verify.report import format_json

    if args.baseline or any(read_manifest(folder).family == ATTACH_FAMILY for folder in args.artifacts):
        from .quiet import silence_libraries

        silence_libraries()  # which imports diffusers
    cold_runs = 0 if args.no_cold else args.cold_runs
    choices = BenchOptions(args.baseline, args.runs, cold_runs, args.steps, args.threads, args.model)
    with open_progress(progress_mode(args)) as shown:
        described = bench_report.describe_bench(run_bench(args.artifacts, choices, shown))
    if args.json:
        print(format_json(described), end="")
    elif not args.quiet:
        bench_report.print_bench(described, sys.stdout)
    if args.output:
        bench_report.write_bench_report(args.output, described)
    return 0
