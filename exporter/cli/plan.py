"""`prebake plan`: adds a plan to an artifact, or removes one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_output_modes, parse_positive, print_json, progress_mode
from .sign import add_key, note_on_stderr

if TYPE_CHECKING:
    from ...runtime.manifest import Manifest
    from ...runtime.plan import Plan
    from ..recipe.resolve import Recipe


def add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="add a plan to an artifact, or remove one, without compiling",
        description="Adds the plan for another number of steps, with the artifact's cache and scheduler or others, as long as "
        "the variants that it needs are compiled. The artifact changes in one move; a run that is stopped leaves it as it was.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--steps", type=parse_positive, metavar="N", help="the number of steps, and the plan's name")
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
        metavar="ID|FOLDER|FILE|shapes|tiny:FAMILY",
        help="where the pipeline is, if not where the manifest says; with --verify",
    )
    add_key(parser)
    add_output_modes(parser)
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from .. import add_plan as replan
    from ..cost.forecast import format_forecast
    from ..package.sign import keep_signed
    from ..progress import open_progress
    from .quiet import silence_libraries

    silence_libraries()
    folder = args.artifact.resolve()
    with open_progress(progress_mode(args)) as shown, keep_signed(folder, args.key, note_on_stderr):
        if args.remove is not None:
            result = {"removed": args.remove, "plans_left": list(replan.remove_plan(folder, args.remove).plans)}
        else:
            choices = replan.PlanOptions(args.force, args.verify, args.dry_run, args.model)
            result = _describe_plans(
                *replan.add_plans(folder, _change_recipe(folder, args), args.steps, choices, shown)
            )
    if args.json:
        print_json({**result, "seconds": shown.seconds})
    elif not args.quiet and args.remove is not None:
        print(f"removed {args.remove}; {args.artifact} has the plans {', '.join(result['plans_left'])}")
    elif not args.quiet:
        print(*format_forecast(result, sys.stdout.encoding), sep="\n")
        if result["unverified"] and not args.dry_run:
            print(f"not compared with the pipeline; `prebake verify {args.artifact} --source` does that")
    return 0


def _change_recipe(folder: Path, args: argparse.Namespace) -> Recipe:
    """The artifact's recipe with what the command line changes in it."""
    from ...runtime.errors import RecipeError
    from ...runtime.manifest import read_manifest
    from ..recipe.resolve import change_recipe, check_scheduler
    from ..verify.source_pipeline import manifest_recipe

    if foreign := [o for o in args.overrides if not o.strip().startswith(("cache", "sampler.", "verify."))]:
        raise RecipeError(
            f"--set {foreign[0]}: is compiled in; a plan can change cache, sampler and verify. Export again"
        )
    overrides = [f"sampler.steps={args.steps}"]
    overrides += [f"sampler.scheduler={args.scheduler}"] if args.scheduler else []
    overrides += [f"cache.method={args.cache}"] if args.cache else []
    recipe = change_recipe(
        manifest_recipe(folder, read_manifest(folder)), f"{args.artifact}: its recipe", [*overrides, *args.overrides]
    )
    check_scheduler(recipe.sampler.scheduler)
    return recipe


def _describe_plans(manifest: Manifest, plans: dict[str, Plan]) -> dict[str, Any]:
    """The new plans as `--dry-run` of an export describes its plans, without times."""
    from ...runtime.manifest import size_graph_name
    from ...runtime.text import variant_signs
    from ..cost.forecast import plan_figures

    flops = {g.name: g.cost.flops for g in manifest.graphs}
    names = variant_signs(manifest, plans.values())
    whole = {name: size_graph_name("full", name.partition(".")[2] or None) for name in names}
    shares = {name: flops[name] / flops[whole[name]] for name in names}
    return {
        "plans": {name: plan_figures(plan, names, shares) for name, plan in plans.items()},
        "variants": names,
        "unverified": [name for name in plans if manifest.status != "verified" or name in manifest.unverified],
    }
