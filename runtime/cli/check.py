"""The command `check`: whether this machine can run an artifact, every problem at once, and nothing of it opened as code.

`load` stops at the first kind of problem, since what is wrong with a manifest makes the rest meaningless. Here each kind is
looked at as far as the ones before allow.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..problems import artifact_problems, pipeline_problems
from .streams import json_text, print_lines


def add_check(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check",
        help="say whether this machine can run an artifact, and all that is wrong with it",
        description="Says everything that is wrong with an artifact, or that it needs and this machine lacks, without "
        "opening its machine code. Every file is hashed. Exits with 0 where nothing is wrong, else with 5.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="an artifact's folder")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(run=check)


def check(args: argparse.Namespace) -> int:
    """Prints what is wrong, a line each, or that nothing is. The exit code is that of a refused artifact where something is."""
    folder = Path(args.artifact)
    found = [
        {"kind": kind, "problem": problem}
        for kind, problem in [*artifact_problems(folder)] or [*pipeline_problems(folder)]
    ]
    if args.json:
        print(json_text({"artifact": str(folder), "ok": not found, "problems": found}, indent=2))
    else:
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        summary = f"{folder}: {count if found else 'nothing is wrong, and this machine can run it'}"
        print_lines(*(each["problem"] for each in found), summary)
    return ArtifactError.exit_code if found else 0
