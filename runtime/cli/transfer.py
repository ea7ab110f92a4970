"""The commands `push` and `pull`: an artifact to a folder or the Hugging Face Hub, and from there. They need no exporter."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .streams import print_lines

if TYPE_CHECKING:
    from ..transfer.progress import TransferProgressMode
    from ..transfer.pull import TransferResult

PLACE_METAVAR = "FOLDER|hf://OWNER/NAME[@REVISION]"


def add_push(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "push",
        help="copy an artifact to a folder or to the Hugging Face Hub",
        description="Checks an artifact, copies it to a folder or into a model repository of the Hugging Face Hub, and compares "
        "what has arrived with its manifest. The place holds the whole artifact or what it held before. Push again where it was "
        "interrupted: what has arrived is not sent again. A repository that is not there is made, a private one. "
        "hf:// needs pip install 'prebake[hub]'.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact's folder")
    parser.add_argument("destination", metavar=PLACE_METAVAR, help="where it goes")
    parser.add_argument("--force", action="store_true", help="replace another artifact that is there")
    add_progress_options(parser)
    parser.set_defaults(run=push)


def add_pull(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "pull",
        help="fetch an artifact from a folder or from the Hugging Face Hub",
        description="Fetches an artifact, compares every file with its manifest, and this machine with what it needs, and then "
        "puts it in place under its name. Opens none of its code. Pull again where it was interrupted: what has arrived is not "
        "fetched again.",
    )
    parser.add_argument("source", metavar=PLACE_METAVAR, help="where it lies")
    parser.add_argument("folder", type=Path, metavar="ARTIFACT", help="the artifact's folder, which is made")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="of whoever must have signed it, in PEM")
    parser.add_argument(
        "--minimum-release", type=int, metavar="N", help="refuse what was signed with a lower --release, or with none"
    )
    parser.add_argument("--any-machine", action="store_true", help="fetch also what this machine could not run")
    parser.add_argument("--force", action="store_true", help="replace another artifact that is there")
    add_progress_options(parser)
    parser.set_defaults(run=pull)


def add_progress_options(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print nothing but errors")
    how.add_argument(
        "--json", action="store_true", help="JSON lines about progress on stderr, one JSON result on stdout"
    )


def push(args: argparse.Namespace) -> int:
    """Runs the command `push`. Raises as `push.push` does."""
    from ..transfer import push as stage
    from ..transfer.progress import open_transfer_progress

    with open_transfer_progress(progress_mode(args)) as shown:
        moved = stage.push(args.artifact, args.destination, force=args.force, bar=shown)
    print_transfer(moved, args)
    return 0


def pull(args: argparse.Namespace) -> int:
    """Runs the command `pull`. Raises as `pull.pull` does."""
    from ..transfer.progress import open_transfer_progress
    from ..transfer.pull import PullOptions
    from ..transfer.pull import pull as fetch
    from ..transfer.push import origin_of

    choices = PullOptions(args.public_key, args.any_machine, args.force, args.minimum_release)
    with open_transfer_progress(progress_mode(args)) as shown:
        moved = fetch(origin_of(args.source), args.folder, choices, shown)
    print_transfer(moved, args)
    return 0


def progress_mode(args: argparse.Namespace) -> TransferProgressMode:
    return "json" if args.json else "quiet" if args.quiet else "rich"


def print_transfer(moved: TransferResult, args: argparse.Namespace) -> None:
    """Prints where the artifact is, how large it is, and at which commit."""
    from ..text import format_bytes

    if args.json:
        print(json.dumps(asdict(moved), indent=2))
    elif not args.quiet:
        at = f", commit {moved.revision}" if moved.revision else ""
        print_lines(f"{moved.place}: {moved.files} files, {format_bytes(moved.size)}, all as the manifest says{at}")
