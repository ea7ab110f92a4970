"""The command `prebake`: arguments come in, an exit code of `runtime/errors.py` comes out.

`recipes` and `verify` are here, `export`, `sign`, `bench`, `report`, `plan`, `cache` and `calibrate` in files of their names (`cli_bench.py`, ...),
`run` and `inspect` in `runtime/cli.py`. torch and diffusers are imported by the commands that need them and never for `--help`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from ...runtime.cli.command import CommandLine
from ...runtime.cli.parser import CommandParser
from ...runtime.cli.streams import print_lines
from .bench import add_bench
from .cache import add_cache
from .calibrate import add_calibrate
from .completion import add_completion
from .errors import missing_extra
from .export import add_export
from .options import add_output_modes, add_overrides, parse_positive, print_json, progress_mode, read_overrides
from .plan import add_plan
from .report import add_report
from .sign import add_key, add_sign, add_signature, note_on_stderr, refuse_signature_choices, verify_signature

INTERRUPT_NOTES = {  # by a command that is interrupted
    "export": "; nothing was written",
    "plan": "; nothing was written",
    "push": "; what has arrived there is not sent again",
    "pull": "; what has arrived is not fetched again",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. What prebake refuses goes to stderr, a line per problem; anything else is a bug and keeps its traceback."""
    return CommandLine(_parser(), "prebake: ", INTERRUPT_NOTES, missing_extra).run(argv)


def export_main() -> int:
    """The second entry point: `export --recipe flux-fast` is `prebake export --recipe flux-fast`."""
    return main(["export", *sys.argv[1:]])


def _parser() -> CommandParser:
    from ...runtime.cli.main import add_commands as add_runtime_commands
    from ...runtime.errors import EXIT_CODES

    parser = CommandParser(
        prog="prebake",
        description="Exports diffusers pipelines ahead of time, and runs what it exported.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["exit codes:", *(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())]),
    )
    parser.add_argument("--version", action="version", version=f"prebake {version('prebake')}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    add_export(commands)
    add_calibrate(commands)
    _add_verify(commands)
    add_sign(commands)
    add_bench(commands)
    add_report(commands)
    add_plan(commands)
    add_cache(commands)
    _add_recipes(commands)
    add_runtime_commands(commands)
    add_completion(commands, parser)
    return parser


# prebake recipes


def _add_recipes(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "recipes",
        help="list the recipes, or show one",
        description="Lists the recipes that ship. With a name or a file: the recipe as it resolves, in TOML, under the file as comments.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME|FILE", help="a recipe that ships, or a .toml file")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="JSON in place of text")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipe files, for editors")
    parser.set_defaults(run=_recipes)


def _recipes(args: argparse.Namespace) -> int:
    from ...runtime.errors import RecipeError
    from ..recipe import resolve as recipe

    if args.schema:
        print_json(recipe.recipe_schema())
    elif args.name is not None:
        _show_recipe(args)
    elif read_overrides(args) or args.model:
        raise RecipeError(
            "`prebake recipes` with --set, --lora or --model needs the name of a recipe: prebake recipes flux-fast --set cache.method=none"
        )
    else:
        _list_recipes(as_json=args.json)
    return 0


def _show_recipe(args: argparse.Namespace) -> None:
    from ..recipe.resolve import read_recipe_file, resolve, to_toml

    resolved = resolve(args.name, read_overrides(args), args.model)
    if args.json:
        return print_json(resolved.model_dump(mode="json"))
    file = read_recipe_file(args.name)
    print(f"# {file.label}:", "#", *(f"# {line}".rstrip() for line in file.text.splitlines()), "#", sep="\n")
    print(
        "# resolved, with every default:"
        if not read_overrides(args)
        else f"# resolved, with every default and {len(read_overrides(args))} --set:"
    )
    print(f"\n{to_toml(resolved)}", end="")
    return None


def _list_recipes(*, as_json: bool) -> None:
    from ..recipe.resolve import read_recipe_file, recipe_names

    rows = [(name, str(read_recipe_file(name).data["description"])) for name in recipe_names()]
    if as_json:
        print_json([{"name": name, "description": description} for name, description in rows])
    elif not (sys.stdout.isatty() and _print_table(rows)):
        for name, description in rows:
            print(f"{name}\t{description}")


def _print_table(rows: list[tuple[str, str]]) -> bool:
    """Draws the rows with rich; False where rich is not installed (it comes with the `export` extra)."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table("recipe", "what it does", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return True


# prebake verify


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="replay an artifact's golden vectors here, or compare it with its pipeline again",
        description="Replays the artifact's golden vectors on this machine. With --source, also draws prompts with the artifact "
        "and with the eager float32 pipeline, and holds the figures to the recipe's thresholds; what the artifact has unverified is "
        "then marked as verified. Exit code 4: something misses. With --signature, opens no code.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    parser.add_argument(
        "--source", action="store_true", help="run the pipeline it came from as well, with the same seeds and prompts"
    )
    parser.add_argument(
        "--model",
        metavar="ID|FOLDER|FILE|shapes|tiny:FAMILY",
        help="where the pipeline is, if not where the manifest says; with --source",
    )
    parser.add_argument(
        "--prompt-set",
        choices=("recipe", "accuracy", "all"),
        default="all",
        help="the recipe's prompts, those that the model's checker judges, or both (default: all)",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts in place of the recipe's, one a line")
    parser.add_argument(
        "--seeds",
        type=parse_positive,
        metavar="N",
        help="seeds 0 to N - 1 for each prompt, in place of the recipe's number",
    )
    parser.add_argument("--limit", type=parse_positive, metavar="N", help="at most N prompts of each set")
    parser.add_argument(
        "--budget", metavar="TIME", help="90s, 10m, 2h or full: the time for it, in place of the recipe's verify.budget"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="keep here what the pipeline gives, and do not draw again what is here (default: the cache, until the command ends)",
    )
    parser.add_argument(
        "--part",
        type=parse_part,
        metavar="K/N",
        help="draw the K-th of N parts into --results, on one of N machines; no verdict",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the report goes (default with --source: ARTIFACT/reports; else nowhere)",
    )
    add_signature(parser)
    add_key(parser)
    add_output_modes(parser, json_result="the report as JSON")
    parser.set_defaults(run=_verify)


def parse_part(text: str) -> tuple[int, int]:
    """`2/3` as (2, 3)."""
    from ..verify.options import parse_part as parse

    try:
        return parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _verify(args: argparse.Namespace) -> int:
    if args.signature:
        return verify_signature(args)
    refuse_signature_choices(args)
    from ...runtime.errors import QualityError
    from ..package.sign import keep_signed
    from ..progress import open_progress
    from ..verify import report
    from ..verify.options import VerifyOptions
    from ..verify.outcome_tables import print_outcome
    from ..verify.verify import verify_artifact
    from .quiet import silence_libraries

    silence_libraries()
    chosen = (args.source, args.model, args.prompts, args.prompt_set, args.seeds, args.limit, args.budget)
    choices = VerifyOptions(*chosen, results=args.results, part=args.part)
    with open_progress(progress_mode(args)) as shown, keep_signed(args.artifact, args.key, note_on_stderr):
        manifest, outcome = verify_artifact(args.artifact, choices, shown)
    if args.json:
        print(report.format_json(report.describe_outcome(manifest, outcome)), end="")
    elif args.quiet:
        print_lines(*outcome.missed, file=sys.stderr)
    else:
        print_outcome(manifest, outcome, sys.stdout)
    if args.output or args.source:  # last, so that a folder that cannot be written costs no result
        report.write_verify_report(args.output or args.artifact / "reports", manifest, outcome)
    return QualityError.exit_code if outcome.missed else 0
