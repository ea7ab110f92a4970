"""`python -m prebake.runtime run|inspect|check|push|pull ...`: the commands that need nothing but the slim runtime."""

import argparse
import sys

from .cli.main import add_commands
from .cli.streams import escape_unprintable, print_lines
from .errors import PrebakeError


def main(argv: list[str] | None = None) -> int:
    escape_unprintable()
    parser = argparse.ArgumentParser(prog="python -m prebake.runtime", description="Replays and describes artifacts.")
    add_commands(parser.add_subparsers(dest="command", metavar="command", required=True))
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except PrebakeError as e:
        print_lines(*f"error: {e}".split("\n"), file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
