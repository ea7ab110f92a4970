"""The command `run`: images or videos from an artifact, into files or to the standard output."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..manifest import Manifest, read_manifest
from .streams import output_errors, utf8_argument

STDOUT = Path("-")  # --output of what goes there
DEFAULT_FPS = 8  # what CogVideoX was trained on


def add_run(subparsers: Any) -> None:
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
