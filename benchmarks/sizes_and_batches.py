"""Images a second by size and by number of images in a call: an artifact of listed sizes and one of a range, beside diffusers in eager and
under torch.compile.

    python benchmarks/sizes_and_batches.py --output benchmarks/results/sizes_and_batches.json

Exports MODEL twice, in float32 without quantization and cache: with two sizes and calls for 1, 2 and 4 images, and with a range that has both
sizes. The ways take turns, call by call; figures are medians, and errors are of the final latents against eager's, relative in L2. diffusers
draws a call's images in one batch, and `torch.compile(dynamic=True)` compiles its transformer once for all sizes and batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import prebake
from prebake.exporter.load import source

FLOAT32 = {f"precision.{part}": "float32" for part in ("denoiser", "text_encoders", "vae")}
PROMPT = "a large red star left of a small blue circle"
Draw = Callable[[int, int, int, str], Any]
"""Images of height x width, so many, as this output type."""


def export_sizes(args: argparse.Namespace, output: Path, shapes: dict[str, Any]) -> tuple[prebake.Pipeline, float]:
    """An artifact of the model, open, and the seconds that its export took. Unverified: it is held against eager here."""
    overrides = {
        **FLOAT32,
        "quantize.method": "none",
        "cache.method": "none",
        "sampler.steps": [args.steps],
        "shapes.batch": args.batches,
        **shapes,
    }
    start = time.perf_counter()
    prebake.export(args.recipe, model=args.model, output=output, overrides=overrides, verify=False, cache=False)
    seconds = time.perf_counter() - start
    return prebake.load(output), seconds


def range_shapes(args: argparse.Namespace) -> dict[str, Any]:
    """Heights and widths from the least to the largest side of the sizes."""
    sides = sorted(int(side) for size in args.sizes for side in size.split("x"))
    side = {"min": sides[0], "max": max(sides[-1], sides[0] + args.step), "step": args.step}
    return {"shapes.height": side, "shapes.width": side}


def eager_pipeline(model: str) -> Any:
    pipe = source.load_model(model, None, {"default": torch.float32}).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compiled_pipeline(model: str) -> Any:
    pipe = eager_pipeline(model)
    pipe.transformer = torch.compile(pipe.transformer, dynamic=True)
    return pipe


def time_calls(ways: dict[str, Draw], args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each size and batch, and each way, the median seconds of a call, images a second, and the ratio to eager."""
    rows = []
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        latents = {name: draw(height, width, 1, "latent")[0].float() for name, draw in ways.items()}
        errors = {name: float((x - latents["eager"]).norm() / latents["eager"].norm()) for name, x in latents.items()}
        for batch in args.batches:
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(args.repeats + 1):
                for name, draw in ways.items():
                    start = time.perf_counter()
                    draw(height, width, batch, "pil")
                    if repeat:  # the first call is slow
                        seconds[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(each) for name, each in seconds.items()}
            rows.append(
                {
                    "size": size,
                    "images": batch,
                    "images_per_s": {name: batch / s for name, s in medians.items()},
                    "times_eager": {name: medians["eager"] / s for name, s in medians.items()},
                    "relative_error": errors,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--recipe", default="flux-fast")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", default=["64x64", "96x64"])
    parser.add_argument("--step", type=int, default=16, help="of the range, in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-compile", action="store_true", help="leaves torch.compile out")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prebake-sizes-") as folder:
        exported = {
            "listed": export_sizes(args, Path(folder) / "listed", {"shapes.sizes": args.sizes}),
            "range": export_sizes(args, Path(folder) / "range", range_shapes(args)),
        }
        ways: dict[str, Draw] = {
            name: lambda h, w, n, kind, pipe=pipe: pipe([PROMPT] * n, height=h, width=w, seed=0, output_type=kind)[0]
            for name, (pipe, _) in exported.items()
        }
        theirs = {"eager": eager_pipeline} | ({} if args.without_compile else {"torch.compile": compiled_pipeline})
        for name, pipe in ((name, build(args.model)) for name, build in theirs.items()):
            ways[name] = lambda h, w, n, kind, pipe=pipe: pipe(
                [PROMPT] * n,
                height=h,
                width=w,
                num_inference_steps=args.steps,
                generator=torch.Generator().manual_seed(0),
                output_type=kind,
            )[0]
        rows = time_calls(ways, args)
    if args.output:
        told = {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "model": args.model,
            "steps": args.steps,
            "export_s": {name: seconds for name, (_, seconds) in exported.items()},
            "rows": rows,
        }
        args.output.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
