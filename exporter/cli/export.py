"""`prebake export`: one recipe, or several in one run."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.cli.command import print_errors
from ...runtime.cli.signals import describe_interrupt
from .options import add_output_modes, add_overrides, print_json, progress_mode, read_overrides
from .summary import summarize_artifact, summary_lines

if TYPE_CHECKING:
    from ..recipe.resolve import Recipe
    from .matrix import ExportRow, RowOutcome


def add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="compile a pipeline into an artifact",
        description="Compiles a diffusers pipeline into an artifact, verifies it against the pipeline, and puts it in place only "
        "if it holds. Of several, all are tried, and the exit code is that of the worst: see docs/how-to/ci.md.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--recipe",
        action="append",
        metavar="NAME|FILE",
        help="a recipe that ships (see `prebake recipes`), or a .toml file; may be repeated",
    )
    what.add_argument(
        "--matrix",
        type=Path,
        metavar="FILE",
        help="a .toml file with an [[export]] table of recipe, model, set, output for each",
    )
    add_overrides(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the artifact goes (default: artifacts/<recipe>-<model name>)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve, load, plan and capture, say what each graph and plan would cost on this machine, and stop",
    )
    parser.add_argument(
        "--keep-failed",
        action="store_true",
        help="keep an artifact that missed its thresholds, beside the output and marked failed",
    )
    parser.add_argument("--force", action="store_true", help="replace an artifact that is already there")
    parser.add_argument(
        "--verify",
        choices=("now", "later"),
        default="now",
        help="later: skip the comparison with the pipeline; the manifest then says unverified, and `prebake verify --source` "
        "settles it, here or on another machine (default: now)",
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_const", const="later", help="the same as --verify later"
    )
    parser.add_argument(
        "--junit", type=Path, metavar="FILE", help="write a JUnit report, with a test case for each export"
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where compiled graphs are kept for further exports (default: $XDG_CACHE_HOME/prebake/compiled)",
    )
    cache.add_argument("--no-cache", action="store_true", help="compile every graph, and keep none")
    add_output_modes(parser)
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    """Runs `prebake export`: one recipe alone raises what is wrong with it, of several each error is in the report."""
    rows = _read_rows(args)
    if args.matrix or args.junit or len(rows) > 1:
        return _export_rows(rows, args)
    _print_result(_export_row(rows[0], args), args)
    return 0


def _read_rows(args: argparse.Namespace) -> Sequence[ExportRow]:
    """The exports of the command line, one or more. Raises RecipeError for a matrix file that is none."""
    from .matrix import ExportRow, read_matrix

    if args.matrix:
        return read_matrix(args.matrix, args.model, read_overrides(args))
    return [ExportRow(name, args.model, tuple(read_overrides(args)), args.output) for name in args.recipe]


def _export_row(row: ExportRow, args: argparse.Namespace) -> dict[str, Any]:
    """Exports one row; what `--json` prints of it. Raises RecipeError, ExportError or ArtifactError."""
    from ..recipe.resolve import check_inductor_flags, check_scheduler, resolve
    from .quiet import silence_libraries

    recipe = resolve(row.recipe, row.overrides, row.model)
    silence_libraries()
    check_inductor_flags(recipe.compile.inductor)
    check_scheduler(recipe.sampler.scheduler)
    return _export_recipe(recipe, row, args)


def _export_recipe(recipe: Recipe, row: ExportRow, args: argparse.Namespace) -> dict[str, Any]:
    from ..cost import forecast
    from ..export_cache.store import Store, default_store_folder
    from ..pipeline import ExportOptions, export, prepare
    from ..progress import open_progress
    from ..recipe.resolve import recipe_folder

    near = recipe_folder(row.recipe)
    store = None if args.no_cache else Store(args.cache_dir or default_store_folder())
    options = ExportOptions(
        force=args.force, keep_failed=args.keep_failed, verify=args.verify == "now", near=near, store=store
    )
    with open_progress(progress_mode(args)) as shown:
        if args.dry_run:
            prepared = prepare(recipe, shown, near=near)
            with shown.stage("forecast"):
                result = forecast.describe_forecast(prepared, forecast.forecast_graphs(prepared, shown))
        else:
            artifact = export(recipe, row.output or default_output(recipe), options, shown)
            result = {"artifact": str(artifact), "graphs": shown.graphs, **summarize_artifact(artifact)}
    return {**result, "seconds": shown.seconds}


def _print_result(result: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print_json(result)
    elif not args.quiet:
        print(*_result_lines(result), sep="\n")


def _result_lines(result: dict[str, Any]) -> Iterator[str]:
    """The result for people: where the artifact is, or what `--dry-run` found, in aligned columns."""
    from ..cost.forecast import format_forecast

    if "artifact" in result:
        yield result["artifact"]
        yield from summary_lines(result)
    if "plans" in result:
        yield from format_forecast(result, sys.stdout.encoding)


def default_output(recipe: Recipe) -> Path:
    """`artifacts/<recipe>-<model name>`: the last part of a hub id or of a folder's path."""
    model = Path(recipe.model.id)
    name = model.name or model.resolve().name or "model"
    return Path("artifacts") / f"{recipe.name}-{name if name != '..' else model.resolve().name}"


# several


def _export_rows(rows: Sequence[ExportRow], args: argparse.Namespace) -> int:
    """Tries every row, prints the summary or the JSON report, writes `--junit`; the worst exit code.

    Raises RecipeError for what makes the run as a whole impossible, before the first export.
    """
    from . import matrix

    _check_paths(rows, args)
    tried: list[RowOutcome] = []
    code = 0
    try:
        for row in rows:
            _print_row(len(tried) + 1, len(rows), row, args)
            tried.append(_try_row(row, args))
            if args.dry_run and tried[-1].code == 0 and not args.json:
                _print_result(tried[-1].result, args)
    except KeyboardInterrupt as e:
        code, word = describe_interrupt(e)
        print(f"prebake: {word}; what was exported before is in place", file=sys.stderr)
    code = code or matrix.worst_code(one.code for one in tried)
    if args.json:
        print_json(matrix.matrix_json(tried, code))
    elif not args.quiet:
        print(*matrix.summary_lines(tried), sep="\n")
    if args.junit:
        args.junit.write_text(matrix.junit_xml(tried), "utf-8")
    return code


def _print_row(n: int, count: int, row: ExportRow, args: argparse.Namespace) -> None:
    if not (args.quiet or args.json):
        print(f"[{n}/{count}] {' '.join(filter(None, (row.recipe, row.model, *row.overrides)))}", flush=True)


def _check_paths(rows: Sequence[ExportRow], args: argparse.Namespace) -> None:
    """A report that could not be written, and folders that two rows would write, are refused before hours of compiling."""
    from ...runtime.errors import RecipeError
    from . import matrix

    if args.output and (args.matrix or len(rows) > 1):
        raise RecipeError(
            f"--output {args.output}: is one folder, for one --recipe; a --matrix gives each export its own"
        )
    if args.junit:
        try:
            args.junit.open("a").close()
        except OSError as e:
            raise RecipeError(f"--junit {args.junit}: cannot be written ({e.strerror}); choose another file") from e
    matrix.check_outputs(output for row in rows if (output := _row_output(row)) is not None)


def _row_output(row: ExportRow) -> Path | None:
    """The row's output folder; None where its recipe does not resolve, which is reported when it is tried."""
    from ...runtime.errors import PrebakeError
    from ..recipe.resolve import resolve

    if row.output:
        return row.output
    try:
        return default_output(resolve(row.recipe, row.overrides, row.model))
    except PrebakeError:
        return None


def _try_row(row: ExportRow, args: argparse.Namespace) -> RowOutcome:
    """The outcome of one row. A bug is printed with its traceback, and the rows after it are still tried."""
    from ...runtime.errors import PrebakeError
    from .errors import missing_extra
    from .matrix import RowOutcome

    begun = time.perf_counter()
    try:
        return RowOutcome(row, 0, result=_export_row(row, args), seconds=time.perf_counter() - begun)
    except PrebakeError as e:
        code, message = e.exit_code, str(e)
        print_errors(message, "prebake: ")
    except Exception as e:
        if said := missing_extra(e, args.command):
            code, message = 2, said
            print_errors(message, "prebake: ")
        else:
            code, message = 1, f"{type(e).__name__}: {e}"
            traceback.print_exc()
    return RowOutcome(row, code, time.perf_counter() - begun, errors=tuple(message.splitlines()))
