"""`prebake report`: one HTML page about an artifact."""

from __future__ import annotations

import argparse
from pathlib import Path

from .bench import parse_runs
from .options import add_output_modes, print_json, progress_mode

DEFAULT_RUNS = 5


def add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="make one HTML page about an artifact: pictures, plan, errors, times, sizes",
        description="Writes one HTML page that opens from a disk with no network, and its plots as PNG beside it. Pictures and "
        "errors are those that the artifact's verification kept; with --source they are drawn anew, and the artifact stays as it is. "
        "Times are measured now, on this machine.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    parser.add_argument(
        "--source", action="store_true", help="draw the recipe's prompts anew, with the pipeline beside the artifact"
    )
    parser.add_argument(
        "--model",
        metavar="ID|FOLDER|FILE|shapes|tiny:FAMILY",
        help="where the pipeline is, if not where the manifest says; with --source, or an attached artifact",
    )
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument(
        "--runs",
        type=parse_runs,
        default=DEFAULT_RUNS,
        metavar="N",
        help=f"timed pictures of each plan (default: {DEFAULT_RUNS})",
    )
    how_long.add_argument("--no-timing", action="store_true", help="measure no times, and say so on the page")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the page goes (default: ARTIFACT/reports/report.html)"
    )
    add_output_modes(parser, json_result="the written files as JSON")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from ...runtime.errors import RecipeError
    from ...runtime.manifest import ATTACH_FAMILY, read_manifest
    from ..html_report.build import write_page
    from ..html_report.facts import ReportOptions, gather_facts
    from ..progress import open_progress
    from .quiet import silence_libraries

    attached = read_manifest(args.artifact).family == ATTACH_FAMILY
    if args.model and not args.source and (args.no_timing or not attached):
        raise RecipeError("--model: says where the pipeline is; add --source, or leave it out")
    target = args.output or args.artifact / "reports" / "report.html"
    if target.suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"--output {target}: expected the name of a page; end it in .html")
    silence_libraries()
    choices = ReportOptions(args.source, args.model, 0 if args.no_timing else args.runs)
    with open_progress(progress_mode(args)) as shown:
        gathered = gather_facts(args.artifact, choices, shown)
        with shown.stage("page"):
            written = write_page(target, gathered)
    if args.json:
        print_json({"page": str(written[0]), "parts": [str(path) for path in written[1:]]})
    elif not args.quiet:
        print(*written, sep="\n")
    return 0
