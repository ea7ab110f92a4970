"""The command `prebake`: arguments come in, an exit code comes out. 0 = done, 1 = verified and found to miss a threshold,
2 = refused with a reason, 130 = interrupted.

`recipes`, `export`, `plan`, `calibrate` and `verify` are here, `run` and `inspect` in `runtime/cli.py`. torch and diffusers are imported by the
commands that need them and never for `--help`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..runtime.manifest import Manifest
    from ..runtime.plan import Plan
    from .recipe import Recipe

EXPORT_EXTRA = (
    "diffusers",
    "transformers",
    "torchao",
    "accelerate",
    "sentencepiece",
    "google",
    "rich",
    "skimage",
    "matplotlib",
    "setuptools",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. What prebake refuses goes to stderr, a line per problem; anything else is a bug and keeps its traceback."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(
            "prebake: interrupted" + ("; nothing was written" if args.command in ("export", "plan") else ""),
            file=sys.stderr,
        )
        return 130
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in EXPORT_EXTRA:
            raise
        return _refuse(f"`prebake {args.command}` needs {package}: pip install 'prebake[export]'")
    except Exception as e:
        from ..runtime.errors import PrebakeError

        if not isinstance(e, PrebakeError):
            raise
        return _refuse(str(e))


def export_main() -> int:
    """The second entry point: `export --recipe flux-fast` is `prebake export --recipe flux-fast`."""
    return main(["export", *sys.argv[1:]])


def _refuse(message: str) -> int:
    for line in message.splitlines():
        print(f"prebake: error: {line}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    from ..runtime.cli import add_commands as add_runtime_commands

    parser = argparse.ArgumentParser(
        prog="prebake", description="Exports diffusers pipelines ahead of time, and runs what it exported."
    )
    parser.add_argument("--version", action="version", version=f"prebake {version('prebake')}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_export(commands)
    _add_calibrate(commands)
    _add_verify(commands)
    _add_plan(commands)
    _add_recipes(commands)
    add_runtime_commands(commands)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="ID|FOLDER|shapes",
        help="the model, in place of the recipe's: hub id, folder, or the small one that ships",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="table.key=value",
        help="change one value of the recipe; may be repeated",
    )


# prebake recipes


def _add_recipes(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "recipes",
        help="list the recipes, or show one",
        description="Lists the recipes that ship. With a name or a file: the recipe as it resolves, in TOML, under the file as comments.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME|FILE", help="a recipe that ships, or a .toml file")
    _add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="JSON in place of text")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipe files, for editors")
    parser.set_defaults(run=_recipes)


def _recipes(args: argparse.Namespace) -> int:
    from ..runtime.errors import RecipeError
    from . import recipe

    if args.schema:
        _print_json(recipe.schema())
    elif args.name is not None:
        _show(args)
    elif args.overrides or args.model:
        raise RecipeError(
            "`prebake recipes` with --set or --model needs the name of a recipe: prebake recipes flux-fast --set cache.method=none"
        )
    else:
        _list(as_json=args.json)
    return 0


def _show(args: argparse.Namespace) -> None:
    from .recipe import read, resolve, to_toml

    resolved = resolve(args.name, args.overrides, args.model)
    if args.json:
        return _print_json(resolved.model_dump(mode="json"))
    file = read(args.name)
    print(f"# {file.label}:", "#", *(f"# {line}".rstrip() for line in file.text.splitlines()), "#", sep="\n")
    print(
        "# resolved, with every default:"
        if not args.overrides
        else f"# resolved, with every default and {len(args.overrides)} --set:"
    )
    print(f"\n{to_toml(resolved)}", end="")
    return None


def _list(*, as_json: bool) -> None:
    from .recipe import names, read

    rows = [(name, str(read(name).data["description"])) for name in names()]
    if as_json:
        _print_json([{"name": name, "description": description} for name, description in rows])
    elif not (sys.stdout.isatty() and _table(rows)):
        for name, description in rows:
            print(f"{name}\t{description}")


def _table(rows: list[tuple[str, str]]) -> bool:
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


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# prebake export


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="compile a pipeline into an artifact",
        description="Compiles a diffusers pipeline into an artifact, verifies it against the pipeline, and puts it in place only if it holds.",
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME|FILE",
        help="a recipe that ships (see `prebake recipes`), or a .toml file",
    )
    _add_overrides(parser)
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
        "--no-verify",
        action="store_true",
        help="skip the comparison with the pipeline; the manifest then says unverified",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print nothing but errors")
    how.add_argument(
        "--json", action="store_true", help="JSON lines about progress on stderr, one JSON result on stdout"
    )
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from .hush import hush
    from .recipe import check_inductor_flags, check_scheduler, resolve

    recipe = resolve(args.recipe, args.overrides, args.model)
    hush()
    check_inductor_flags(recipe.compile.inductor)
    check_scheduler(recipe.sampler.scheduler)
    _run_export(recipe, args.output or default_output(recipe), args)
    return 0


def _run_export(recipe: Recipe, output: Path, args: argparse.Namespace) -> None:
    from . import forecast
    from .pipeline import Options, export, prepare
    from .progress import progress
    from .recipe import folder_of

    near = folder_of(args.recipe)
    options = Options(force=args.force, keep_failed=args.keep_failed, verify=not args.no_verify, near=near)
    with progress(_mode(args)) as shown:
        if args.dry_run:
            prepared = prepare(recipe, shown, near=near)
            with shown.stage("forecast"):
                result = forecast.describe(prepared, forecast.forecasts(prepared))
        else:
            result = {"artifact": str(export(recipe, output, options, shown))}
    if args.json:
        _print_json({**result, "seconds": shown.seconds})
    elif not args.quiet:
        print(*_lines(result), sep="\n")


def _mode(args: argparse.Namespace) -> Literal["rich", "json", "quiet"]:
    return "json" if args.json else "quiet" if args.quiet else "rich"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """The result for people: where the artifact is, or what `--dry-run` found, in aligned columns."""
    from .forecast import lines

    if "artifact" in result:
        yield result["artifact"]
    if "plans" in result:
        yield from lines(result, sys.stdout.encoding)


def default_output(recipe: Recipe) -> Path:
    """`artifacts/<recipe>-<model name>`: the last part of a hub id or of a folder's path."""
    model = Path(recipe.model.id)
    name = model.name or model.resolve().name or "model"
    return Path("artifacts") / f"{recipe.name}-{name if name != '..' else model.resolve().name}"


# prebake plan


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="add a plan to an artifact, or remove one, without compiling",
        description="Adds the plan for another number of steps, with the artifact's cache and scheduler or others, as long as "
        "the variants that it needs are compiled. The artifact changes in one move; a run that is stopped leaves it as it was.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--steps", type=_positive, metavar="N", help="the number of steps, and the plan's name")
    what.add_argument("--remove", metavar="NAME", help="take the plan of that name out")
    parser.add_argument("--scheduler", metavar="CLASS", help="a diffusers scheduler (default: the artifact's)")
    parser.add_argument("--cache", metavar="METHOD", help="another cache method, or none (default: the artifact's)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="table.key=value",
        help="change one value of the artifact's recipe, in cache, sampler or verify; may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="replace a plan that is there")
    parser.add_argument("--dry-run", action="store_true", help="say what the plan would be, and change nothing")
    parser.add_argument(
        "--verify", action="store_true", help="compare the plan with the pipeline, and add it if it holds"
    )
    parser.add_argument(
        "--model",
        metavar="ID|FOLDER|shapes",
        help="where the pipeline is, if not where the manifest says; with --verify",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print nothing but errors")
    how.add_argument(
        "--json", action="store_true", help="JSON lines about progress on stderr, one JSON result on stdout"
    )
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from . import replan
    from .hush import hush
    from .progress import progress

    hush()
    folder = args.artifact.resolve()
    with progress(_mode(args)) as shown:
        if args.remove is not None:
            result = {"removed": args.remove, "plans_left": list(replan.remove(folder, args.remove).plans)}
        else:
            choices = replan.Choices(args.force, args.verify, args.dry_run, args.model)
            result = _added(*replan.add(folder, _asked(folder, args), args.steps, choices, shown))
    if args.json:
        _print_json({**result, "seconds": shown.seconds})
    elif not args.quiet and args.remove is not None:
        print(f"removed {args.remove}; {args.artifact} has the plans {', '.join(result['plans_left'])}")
    elif not args.quiet:
        print(*_lines(result), sep="\n")
        if result["unverified"] and not args.dry_run:
            print(f"not compared with the pipeline; `prebake verify {args.artifact} --source` does that")
    return 0


def _asked(folder: Path, args: argparse.Namespace) -> Recipe:
    """The artifact's recipe with what the command line changes in it."""
    from ..runtime.errors import RecipeError
    from ..runtime.manifest import read_manifest
    from .recipe import changed, check_scheduler
    from .verify import recipe_of

    if foreign := [o for o in args.overrides if not o.strip().startswith(("cache", "sampler.", "verify."))]:
        raise RecipeError(
            f"--set {foreign[0]}: is compiled in; a plan can change cache, sampler and verify. Export again"
        )
    overrides = [f"sampler.steps={args.steps}"]
    overrides += [f"sampler.scheduler={args.scheduler}"] if args.scheduler else []
    overrides += [f"cache.method={args.cache}"] if args.cache else []
    recipe = changed(
        recipe_of(folder, read_manifest(folder)), f"{args.artifact}: its recipe", [*overrides, *args.overrides]
    )
    check_scheduler(recipe.sampler.scheduler)
    return recipe


def _added(manifest: Manifest, plans: dict[str, Plan]) -> dict[str, Any]:
    """What was added, as `--dry-run` of an export tells of its plans, without times."""
    from ..runtime.cli import letters
    from .forecast import plan_figures

    flops = {g.name: g.cost.flops for g in manifest.graphs}
    names = letters(manifest, plans.values())
    shares = {name: flops[name] / flops["full"] for name in names}
    return {
        "plans": {name: plan_figures(plan, names, shares) for name, plan in plans.items()},
        "variants": names,
        "unverified": [name for name in plans if manifest.status != "verified" or name in manifest.unverified],
    }


# prebake calibrate


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="run a model in eager, and record what caches are decided from",
        description="Runs the model in eager and records, per evaluation, how much each part of it changes and what the recipe's "
        "cache method decides. Writes one JSON file beside the recipe, and a picture of it. Name the file in cache.calibration.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="a recipe that ships, or a .toml file")
    _add_overrides(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, one a line (default: the set that an embedded model brings)",
    )
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="runs of each prompt (default: 1)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="number of steps (default: the recipe's first)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the model is run in, whatever the recipe's precision (default: float32)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to (default: cache.calibration or RECIPE.calibration.json, beside the recipe's file or else here)",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print nothing but errors")
    how.add_argument(
        "--json", action="store_true", help="JSON lines about progress on stderr, one JSON result on stdout"
    )
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    import torch

    from ..runtime.errors import RecipeError
    from . import calibration
    from .calibrators import heatmap, runner
    from .hush import hush
    from .progress import progress
    from .recipe import check_scheduler, folder_of, resolve
    from .verify import read_prompts

    recipe = resolve(args.recipe, args.overrides, args.model)
    hush()
    check_scheduler(recipe.sampler.scheduler)
    prompts = runner.prompts_of(recipe.model.id, read_prompts(args.prompts) if args.prompts else None)
    name = getattr(recipe.cache, "calibration", None) or f"{recipe.name}.calibration.json"
    output = args.output or (folder_of(args.recipe) or Path()) / name
    picture = output.with_suffix(".png")
    if output.exists() and not args.force:
        raise RecipeError(f"{output}: already exists; choose another --output, or replace it with --force")
    with progress(_mode(args)) as shown:
        dtype = getattr(torch, args.dtype)
        made = runner.calibrate(recipe, prompts, args.seeds, shown, steps=args.steps, dtype=dtype)
    calibration.write(output, made)
    heatmap.draw(made, picture)
    if args.json:
        _print_json({"calibration": str(output), "picture": str(picture), "seconds": shown.seconds})
    elif not args.quiet:
        print(output, picture, sep="\n")
    return 0


# prebake verify


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="replay an artifact's golden vectors here, or compare it with its pipeline again",
        description="Replays the artifact's golden vectors on this machine. With --source, also draws prompts with the artifact "
        "and with the eager float32 pipeline, and holds the figures to the recipe's thresholds. Exit code 1: something misses.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    parser.add_argument(
        "--source", action="store_true", help="run the pipeline it came from as well, with the same seeds and prompts"
    )
    parser.add_argument(
        "--model",
        metavar="ID|FOLDER|shapes",
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
        "--seeds", type=_positive, metavar="N", help="seeds 0 to N - 1 for each prompt, in place of the recipe's number"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="at most N prompts of each set")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the report goes (default with --source: ARTIFACT/reports; else nowhere)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print nothing but errors")
    how.add_argument(
        "--json", action="store_true", help="JSON lines about progress on stderr, the report as JSON on stdout"
    )
    parser.set_defaults(run=_verify)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _verify(args: argparse.Namespace) -> int:
    from . import report
    from .hush import hush
    from .progress import progress
    from .verify import Choices, verify_artifact

    hush()
    choices = Choices(args.source, args.model, args.prompts, args.prompt_set, args.seeds, args.limit)
    with progress(_mode(args)) as shown:
        manifest, outcome = verify_artifact(args.artifact, choices, shown)
    if args.json:
        print(report.to_json(report.describe(manifest, outcome)), end="")
    elif args.quiet:
        print(*outcome.missed, sep="\n", end="\n" if outcome.missed else "", file=sys.stderr)
    else:
        report.show(manifest, outcome, sys.stdout)
    if args.output or args.source:  # last, so that a folder that cannot be written costs no result
        report.write(args.output or args.artifact / "reports", manifest, outcome)
    return 1 if outcome.missed else 0
