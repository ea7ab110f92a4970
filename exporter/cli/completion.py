"""`prebake completion`: what makes a shell complete the command's words, by shtab, from the parser itself."""

from __future__ import annotations

import argparse
from functools import partial

SHELLS = ("bash", "zsh")
FOLDERS = frozenset({"ARTIFACT", "DIR", "FOLDER"})
"""What the help calls a folder; what else is named FILE, or has it among others, is a file."""


def add_completion(commands: argparse._SubParsersAction, whole: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "completion",
        help="print what makes a shell complete this command",
        description="Prints a script of completions for a shell. For bash it goes to "
        "~/.local/share/bash-completion/completions/prebake, for zsh to _prebake in a folder of $fpath.",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads it")
    parser.set_defaults(run=partial(_completion, whole))


def _completion(whole: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    import shtab

    for action in all_actions(whole):
        if action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif "FILE" in str(action.metavar).split("|"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell=args.shell))
    return 0


def all_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options and arguments of a parser and of its commands."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            found += [each for command in action.choices.values() for each in all_actions(command)]
    return found
