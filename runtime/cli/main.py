"""The commands `run` and `inspect`; `check`, `push` and `pull` have files of their own. All work with the slim runtime alone;
`inspect` and `--help` need no torch.

Each command is a function from parsed arguments to an exit code. Errors are raised; whoever owns `main` prints them.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bounds import MAX_PLAN_BYTES, parse_json
from ..errors import ArtifactError, RequestError, first_line
from ..manifest import Manifest, read_manifest
from ..plan import Plan
from ..text import (
    align_columns,
    block_signs,
    folder_bytes,
    format_bytes,
    format_count,
    step_strip,
    variant_signs,
    weights_bytes,
    weights_text,
    wrap_entries,
)
from .check import add_check
from .streams import json_text, output_errors, print_lines, utf8_argument
from .transfer import add_pull, add_push

STDOUT = Path("-")  # --output of what goes there
SITES_SHOWN = 4  # of the values that outlive a step
DEFAULT_FPS = 8  # what CogVideoX was trained on
UNVERIFIED_NOTE = "added since, and not compared with the pipeline: {}; `prebake verify --source` does that"


def add_commands(subparsers: Any) -> None:
    """Adds the commands to an argparse subparsers object; each sets `run`, a function of the parsed arguments."""
    _add_run(subparsers)
    _add_inspect(subparsers)
    add_check(subparsers)
    add_push(subparsers)
    add_pull(subparsers)


# --- run --------------------------------------------------------------------------------------------------------------


def _add_run(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run", help="make images or videos from an artifact", description="Makes images or videos from an artifact."
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="an artifact's folder")
    parser.add_argument(
        "prompts", nargs="+", type=utf8_argument, metavar="PROMPT", help="what to draw; one image or more for each"
    )
    parser.add_argument("--image", metavar="FILE", help="a picture to begin with, where a model takes one")
    parser.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="how far to go from that picture, 0 to 1 (default: the pipeline's own)",
    )
    parser.add_argument("--mask", metavar="FILE", help="a picture, white where that picture is to be drawn anew")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where to write, - for one image as a PNG on stdout; several are numbered (default: image.png; of videos "
        "video.mp4, or video.gif without PyAV)",
    )
    parser.add_argument("--fps", type=int, metavar="N", help=f"frames per second of a video (default: {DEFAULT_FPS})")
    parser.add_argument("--seed", type=int, help="makes the images reproducible")
    parser.add_argument("--steps", type=int, help="one of the artifact's plans (default: the artifact's own)")
    parser.add_argument("--guidance-scale", type=float, metavar="SCALE", help="default: the artifact's own")
    parser.add_argument(
        "--negative-prompt",
        type=utf8_argument,
        metavar="TEXT",
        help="what to guide away from, where a model takes it (default: nothing)",
    )
    parser.add_argument("--no-cache", action="store_true", help="compute everything at every step")
    parser.add_argument(
        "--trust",
        choices=("hash", "signature", "size"),
        default="hash",
        help="what is compared before code is opened: every file's hash (default), a signature too, or of weights the size alone",
    )
    parser.add_argument("--public-key", metavar="FILE", help="of whoever signed the artifact, with --trust signature")
    parser.add_argument(
        "--minimum-release", type=int, metavar="N", help="refuse what was signed with a lower --release, or with none"
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="images for each prompt (default: 1)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print nothing but errors")
    how.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Makes the images or videos and writes them. Raises RequestError for what the artifact cannot do.

    What the command line alone can get wrong is found before anything is loaded.
    """
    target = _output_path(args, read_manifest(Path(args.artifact)))
    started = time.perf_counter()
    from ..pictures import open_picture
    from ..pipeline import VideoOutput, load

    image, mask = (None if path is None else open_picture(path) for path in (args.image, args.mask))
    pipe = load(args.artifact, trust=args.trust, public_key=args.public_key, minimum_release=args.minimum_release)
    loaded = time.perf_counter()
    output = pipe(
        args.prompts,
        image=image,
        mask_image=mask,
        strength=args.strength,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        num_images_per_prompt=args.num_images,
        cache=not args.no_cache,
    )
    seconds = (loaded - started, time.perf_counter() - loaded)
    kind, made = ("video", output.frames) if isinstance(output, VideoOutput) else ("image", output.images)
    if target == STDOUT:
        print_image(made[0])
        return 0
    paths = _write_outputs(made, target, args.fps or DEFAULT_FPS)
    if not args.quiet:
        _print_outputs(kind, paths, seconds, in_json=args.json)
    return 0


def _output_path(args: argparse.Namespace, manifest: Manifest) -> Path:
    """Where to write. Raises RequestError where what the artifact makes cannot be written there."""
    from ..video import check_video_path, default_video_path

    video = manifest.defaults.num_frames is not None
    if args.output == str(STDOUT):
        refuse_stdout(args, video)
        return STDOUT
    target = Path(args.output) if args.output else default_video_path() if video else Path("image.png")
    if video:
        check_video_path(target, DEFAULT_FPS if args.fps is None else args.fps)
    elif args.fps is not None:
        raise RequestError("--fps: the artifact makes images, which have no frames; leave it out")
    elif target.suffix.lower() not in _image_suffixes():
        raise RequestError(f"{target}: the artifact makes images, and none can be written so; give --output a .png")
    if not target.parent.is_dir():
        raise RequestError(
            f"{target}: there is no folder {target.parent} to write to; make it, or give another --output"
        )
    return target


def refuse_stdout(args: argparse.Namespace, video: bool) -> None:
    """Raises RequestError where stdout cannot hold what is made: one image as a PNG, and nothing else, not for a terminal."""
    count = len(args.prompts) * args.num_images
    if video or count != 1:
        made = "videos" if video else f"{count} images"
        raise RequestError(f"--output -: expected one image, and the artifact would make {made}; give a file's name")
    if args.json or args.fps is not None:
        raise RequestError(f"--output -: stdout holds the image alone; leave {'--json' if args.json else '--fps'} out")
    if sys.stdout.isatty():
        raise RequestError("--output -: stdout is a terminal; send it to a file or a program, or give a file's name")


def print_image(image: Any) -> None:
    """The image as a PNG on stdout."""
    with output_errors():
        image.save(sys.stdout.buffer, "PNG")
        sys.stdout.buffer.flush()


def _image_suffixes() -> set[str]:
    from PIL import Image

    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}


def _write_outputs(made: Sequence[Any], target: Path, fps: int) -> list[Path]:
    """Writes images, or videos as lists of frames; where."""
    from ..video import write_video

    paths = numbered_paths(target, len(made))
    for each, path in zip(made, paths, strict=True):
        if isinstance(each, list):
            write_video(each, path, fps)
        else:
            save_image(each, path)
    return paths


def _print_outputs(kind: str, paths: Sequence[Path], seconds: tuple[float, float], *, in_json: bool) -> None:
    """Prints what was written, and the seconds that loading and making it took."""
    load_seconds, made_seconds = (round(s, 3) for s in seconds)
    if in_json:
        told = {f"{kind}s": [str(path) for path in paths], "load_seconds": load_seconds}
        print(json.dumps(told | {f"{kind}s_seconds": made_seconds}))
    else:
        print(*paths, sep="\n")
        count = f"1 {kind}" if len(paths) == 1 else f"{len(paths)} {kind}s"
        print(f"loaded in {load_seconds:.2f} s, {count} in {made_seconds:.2f} s")


def numbered_paths(path: Path, count: int) -> list[Path]:
    """`x.png` alone, or `x-0.png`, `x-1.png` and so on."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def save_image(image: Any, path: Path) -> None:
    try:
        image.save(path)
    except (OSError, ValueError) as e:
        raise RequestError(
            f"{path}: the image could not be written: {e}; give --output a .png in a folder that exists"
        ) from e


# --- inspect ----------------------------------------------------------------------------------------------------------


def _add_inspect(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="say what is in an artifact",
        description="Says what is in an artifact, without opening its machine code. With --machine: the rates of this machine that "
        "forecasts go by.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("artifact", nargs="?", metavar="ARTIFACT", help="an artifact's folder")
    what.add_argument(
        "--machine",
        action="store_true",
        help="show the rates that `prebake export --dry-run` has measured here, and where they are kept; takes no artifact",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="list every layer: quantized or not, and why; and where kernels are called",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(run=inspect)


def inspect(args: argparse.Namespace) -> int:
    """Prints what the manifest and the plans say, or with --machine the rates of this machine. Raises ArtifactError when manifest
    or plans cannot be read."""
    if args.machine:
        from .machine import print_rates

        print_rates(in_json=args.json)
        return 0
    folder = Path(args.artifact)
    manifest = read_manifest(folder)
    plans = {name: _read_plan(folder, path) for name, path in manifest.plans.items()}
    if args.json:
        print(json_text(inspection_json(manifest, plans), indent=2))
    else:
        print_lines(*inspection_lines(folder, manifest, plans, layers=args.layers))
    return 0


def _read_plan(folder: Path, path: str) -> Plan:
    from ..check.artifact import is_plain_name
    from ..storage.files import open_plain_file

    if not is_plain_name(path):
        raise ArtifactError(f"{folder}: manifest.json [plans]: {path!r} is not a plain name inside the folder")
    with open(open_plain_file(folder, path), "rb") as file:
        data = file.read(MAX_PLAN_BYTES + 1)
    try:
        if len(data) > MAX_PLAN_BYTES:
            raise ValueError(f"it has more than {MAX_PLAN_BYTES} bytes")
        return Plan.model_validate(parse_json(data))
    except ValueError as e:
        raise ArtifactError(
            f"{folder / path}: expected a plan, but {first_line(e)}; restore the file or export again"
        ) from e


def inspection_json(manifest: Manifest, plans: Mapping[str, Plan]) -> dict[str, Any]:
    """The manifest without its list of constants, and the plans as step strips, with sizes and shares."""
    graphs = [
        g.model_dump(mode="json", exclude={"constants"}) | {"share": share}
        for g, share in _flops_shares(manifest, plans)
    ]
    rest = manifest.model_dump(mode="json", exclude={"graphs", "plans", "files"})
    strips = {
        name: {
            "steps": plan.steps,
            "cache": plan.cache,
            "scheduler": plan.scheduler,
            "strip": step_strip(plan, variant_signs(manifest, plans.values())),
            "verified": manifest.status == "verified" and name not in manifest.unverified,
        }
        for name, plan in plans.items()
    }
    return rest | {
        "graphs": graphs,
        "plans": strips,
        "variants": variant_signs(manifest, plans.values()),
        "sizes": folder_bytes(manifest),
        "weights": weights_bytes(manifest),
    }


def inspection_lines(folder: Path, manifest: Manifest, plans: Mapping[str, Plan], *, layers: bool) -> list[str]:
    """The lines of `prebake inspect`."""
    needs, defaults = manifest.requires, manifest.defaults
    versions = {"torch": needs.torch, "glibc": needs.glibc, **needs.packages}
    packages = "".join(f", {name} {version}" for name, version in versions.items() if version)
    frames = "" if defaults.num_frames is None else f"{defaults.num_frames} frames of "
    lines = wrap_entries(
        [
            ("artifact", f"{folder} ({manifest.family}, {manifest.status_line})"),
            *([("compared", manifest.verification.describe())] if manifest.verification else []),
            ("source", f"{manifest.source.model} ({manifest.source.pipeline}, sha256 {manifest.source.sha256[:12]}..)"),
            ("needs", f"{needs.system} {needs.machine}, {needs.device}, {needs.isa_level}{packages}"),
            (
                "defaults",
                f"{defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}, {frames}{defaults.width} x {defaults.height} pixels",
            ),
            ("sizes", ", ".join(f"{name} {format_bytes(size)}" for name, size in folder_bytes(manifest).items())),
            ("weights", weights_text(weights_bytes(manifest), manifest.unquantized_bytes)),
        ]
    )
    rows = [("graph", "FLOPs", "share", "ops", "constants", "bytes", "package")]
    for graph, share in _flops_shares(manifest, plans):
        cost = graph.cost
        rows.append(
            (
                graph.name,
                format_count(cost.flops),
                f"{share:.1%}",
                str(cost.ops),
                str(cost.constants),
                format_bytes(cost.constants_bytes),
                graph.package,
            )
        )
    lines += ["", *align_columns(rows, right=range(1, 6)), "", *_plan_lines(manifest, plans), ""]
    return [*lines, *_layer_lines(manifest, layers)]


def _plan_lines(manifest: Manifest, plans: Mapping[str, Plan]) -> list[str]:
    """Every plan as a step strip, what the signs mean, and which plans nobody has verified."""
    signs = block_signs(variant_signs(manifest, plans.values()), sys.stdout.encoding)
    entries = [("plan", "")]
    for name, plan in plans.items():
        note = ", unverified" if name in manifest.unverified else ""
        entries.append((name, f"{step_strip(plan, signs)}  cache {plan.cache}, {plan.scheduler}{note}"))
    entries.append(("", ", ".join(f"{sign} = {name}" for name, sign in signs.items())))
    if manifest.sites:
        more = f" and {len(manifest.sites) - SITES_SHOWN} more" if len(manifest.sites) > SITES_SHOWN else ""
        entries.append(("stored", ", ".join(site.name for site in manifest.sites[:SITES_SHOWN]) + more))
    lines = wrap_entries(entries)
    if manifest.unverified:
        lines.append(UNVERIFIED_NOTE.format(", ".join(manifest.unverified)))
    return lines


def _layer_lines(manifest: Manifest, every: bool) -> list[str]:
    if every:
        layers = align_columns(
            [("layer", "treatment", "reason"), *((name, *said) for name, said in manifest.layers.items())]
        )
        return [*layers, *_kernel_lines(manifest)]
    counts = Counter(said[0] for said in manifest.layers.values())
    summary = ", ".join(f"{count} {treatment}" for treatment, count in sorted(counts.items())) or "none listed"
    return [f"layers  {summary} (--layers says why)" if counts else f"layers  {summary}"]


def _kernel_lines(manifest: Manifest) -> list[str]:
    """How often each graph calls which of prebake's own kernels, and why one does not take a place that it is for; nothing
    where no graph could call any."""
    rows = [("graph", "kernel", "places", "")]
    for graph in manifest.graphs:
        rows += ((graph.name, kernel, str(count), "called") for kernel, count in graph.kernels.items())
        rows += ((graph.name, r.kernel, str(r.places), f"not: {r.reason}, {r.first}") for r in graph.refusals)
    if len(rows) == 1:
        return []
    left = sum(2 + max(len(row[i]) for row in rows) for i in range(3))
    lines = [""]
    for line in align_columns(rows, right=(2,)):
        lines += [line[:left].rstrip()] if len(line) <= left else _wrap_last_column(line, left)
    return lines


def _wrap_last_column(line: str, left: int) -> list[str]:
    """The line in as many of 80 columns as what follows its first `left` columns takes."""
    first, *rest = textwrap.wrap(line[left:], max(80 - left, 20))
    return [line[:left] + first, *(" " * left + more for more in rest)]


def _flops_shares(manifest: Manifest, plans: Mapping[str, Plan]) -> list[tuple[Any, float]]:
    """(graph, its share of one image's FLOPs): every graph once, denoiser variants as often as the default plan says."""
    calls = Counter({graph.name: 1 for graph in manifest.graphs})
    for name in {variant for plan in plans.values() for variant in plan.variants()}:
        calls[name] = 0
    if default := plans.get(str(manifest.defaults.num_inference_steps)):
        calls.update(evaluation.variant for evaluation in default.evaluations)
    total = sum(calls[graph.name] * graph.cost.flops for graph in manifest.graphs) or 1
    return [(graph, calls[graph.name] * graph.cost.flops / total) for graph in manifest.graphs]
