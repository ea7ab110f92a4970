"""What the subcommands' parsers and functions share: `cli.py`, `cli_calibrate.py` and `cli_plan.py` use it."""

from __future__ import annotations

import argparse
from typing import Literal

from ...runtime.cli.streams import json_text


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="ID|FOLDER|FILE|shapes|tiny:FAMILY",
        help="the model, in place of the recipe's: hub id, folder, safetensors file, the small one that ships, or a random one",
    )
    parser.add_argument(
        "--lora",
        dest="loras",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="add a LoRA to the model's weights, in place of the recipe's; may be repeated",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="table.key=value",
        help="change one value of the recipe; may be repeated",
    )


def read_overrides(args: argparse.Namespace) -> list[str]:
    """The command line's `--set`, and its `--lora` as one more."""
    return [*args.overrides, *([f"model.lora={json_text(args.loras)}"] if args.loras else [])]


def add_output_modes(parser: argparse.ArgumentParser, *, json_result: str = "one JSON result") -> None:
    """--quiet and --json, which exclude each other."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print nothing but errors")
    how.add_argument(
        "--json", action="store_true", help=f"JSON lines about progress on stderr, {json_result} on stdout"
    )


def progress_mode(args: argparse.Namespace) -> Literal["rich", "json", "quiet"]:
    return "json" if args.json else "quiet" if args.quiet else "rich"


def parse_positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def print_json(value: object) -> None:
    print(json_text(value, indent=2))
