"""`python -m prebake.runtime run|serve|inspect|check|push|pull ...`: the commands that need nothing but the slim runtime."""

import sys

from .cli.command import CommandLine
from .cli.main import add_commands
from .cli.parser import CommandParser


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(prog="python -m prebake.runtime", description="Replays and describes artifacts.")
    add_commands(parser.add_subparsers(dest="command", metavar="command", required=True))
    return CommandLine(parser).run(argv)


if __name__ == "__main__":
    sys.exit(main())
