"""The commands that work with the slim runtime alone: `run`, `serve`, `inspect`, `check`, `push` and `pull`. `inspect` and `--help` need no torch.

Each command is a function from parsed arguments to an exit code. Errors are raised; whoever owns `main` prints them.
"""

from __future__ import annotations

from typing import Any

from .check import add_check
from .inspect import add_inspect
from .run import add_run
from .serve import add_serve
from .transfer import add_pull, add_push


def add_commands(subparsers: Any) -> None:
    """Adds the commands to an argparse subparsers object; each sets `run`, a function of the parsed arguments."""
    add_run(subparsers)
    add_serve(subparsers)
    add_inspect(subparsers)
    add_check(subparsers)
    add_push(subparsers)
    add_pull(subparsers)
