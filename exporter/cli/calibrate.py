"""`prebake calibrate`: eager runs of a model in, a calibration and its picture out."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryFile

from .options import add_output_modes, add_overrides, parse_positive, print_json, progress_mode, read_overrides


def add_calibrate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="run a model in eager, and record what caches are decided from",
        description="Runs the model in eager and records, per evaluation, how much each part of it changes and what the recipe's "
        "cache method decides. Writes one JSON file beside the recipe, and a picture of it. Name the file in cache.calibration.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="a recipe that ships, or a .toml file")
    add_overrides(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, one a line (default: the set that an embedded model brings)",
    )
    parser.add_argument("--seeds", type=parse_positive, default=1, metavar="N", help="runs of each prompt (default: 1)")
    parser.add_argument(
        "--steps", type=parse_positive, metavar="N", help="number of steps (default: the recipe's first)"
    )
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
    add_output_modes(parser)
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    import torch

    from ..caches.common import calibration
    from ..calibrators import heatmap, runner
    from ..progress import open_progress
    from ..recipe.resolve import check_scheduler, recipe_folder, resolve
    from ..verify.prompt_choice import read_prompts
    from .quiet import silence_libraries

    recipe = resolve(args.recipe, read_overrides(args), args.model)
    silence_libraries()
    check_scheduler(recipe.sampler.scheduler)
    prompts = runner.choose_prompts(recipe.model.id, read_prompts(args.prompts) if args.prompts else None)
    name = getattr(recipe.cache, "calibration", None) or f"{recipe.name}.calibration.json"
    output = args.output or (recipe_folder(args.recipe) or Path()) / name
    picture = heatmap_path(output, force=args.force)
    with open_progress(progress_mode(args)) as shown:
        dtype = getattr(torch, args.dtype)
        made = runner.calibrate(recipe, prompts, args.seeds, shown, steps=args.steps, dtype=dtype)
    calibration.write_calibration(output, made)
    written = [output, picture] if heatmap.draw_heatmap(made, picture) else [output]
    if args.json:
        files = dict(zip(("calibration", "picture"), map(str, written), strict=False))
        print_json({**files, "seconds": shown.seconds})
    elif not args.quiet:
        print(*written, sep="\n")
    return 0


def heatmap_path(output: Path, *, force: bool) -> Path:
    """The path of the heatmap that goes with the calibration `output`; its folder is there afterwards.

    Raises RecipeError where either file exists, unless `force`, or cannot be written: before the model is run, not after.
    """
    from ...runtime.errors import RecipeError

    if output.is_dir() or output.suffix.lower() == ".png":
        what = "a folder" if output.is_dir() else "the name of its picture"
        raise RecipeError(
            f"{output}: is {what}; name a file for the calibration with --output, such as x.calibration.json"
        )
    picture = output.with_suffix(".png")
    for path in (output, picture):
        if path.exists() and not force:
            raise RecipeError(f"{path}: already exists; choose another --output, or replace it with --force")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass
    except OSError as e:
        raise RecipeError(f"{output}: cannot be written ({e.strerror}); choose another file with --output") from e
    return picture
