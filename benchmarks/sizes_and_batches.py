"""Images a second by size and by number of images in a call: an artifact beside diffusers in eager and under torch.compile.

    python benchmarks/sizes_and_batches.py --output benchmarks/results/sizes_and_batches.json

Exports MODEL with two sizes and calls for 1, 2 and 4 images, in float32 with int8 layers and no cache. The ways take turns, call by call; figures are
medians. diffusers draws a call's images in one batch, and `torch.compile(dynamic=True)` compiles its transformer once for
all sizes and batches.
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


def export_sizes(args: argparse.Namespace, folder: Path) -> Path:
    """An artifact of the model with all sizes and batches, unverified: only its speed is looked at."""
    overrides = {
        **FLOAT32,
        "cache.method": "none",
        "sampler.steps": [args.steps],
        "shapes.sizes": args.sizes,
        "shapes.batch": args.batches,
    }
    return prebake.export(
        args.recipe, model=args.model, output=folder / "artifact", overrides=overrides, verify=False
    ).path


def eager_pipeline(model: str) -> Any:
    pipe = source.load_model(model, None, {"default": torch.float32}).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compiled_pipeline(model: str) -> Any:
    pipe = eager_pipeline(model)
    pipe.transformer = torch.compile(pipe.transformer, dynamic=True)
    return pipe


def time_calls(ways: dict[str, Callable[[int, int, int], Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each size and batch, and each way, the median seconds of a call, images a second, and the ratio to eager."""
    rows = []
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        for batch in args.batches:
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(args.repeats + 1):
                for name, draw in ways.items():
                    start = time.perf_counter()
                    draw(height, width, batch)
                    if repeat:  # the first call is slow
                        seconds[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(each) for name, each in seconds.items()}
            rows.append(
                {
                    "size": size,
                    "images": batch,
                    "images_per_s": {name: batch / s for name, s in medians.items()},
                    "times_eager": {name: medians["eager"] / s for name, s in medians.items()},
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
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prebake-sizes-") as folder:
        pipe = prebake.load(export_sizes(args, Path(folder)))
        ways: dict[str, Callable[[int, int, int], Any]] = {
            "prebake": lambda h, w, n: pipe([PROMPT] * n, height=h, width=w, seed=0)
        }
        for name, theirs in (("eager", eager_pipeline(args.model)), ("torch.compile", compiled_pipeline(args.model))):
            ways[name] = lambda h, w, n, theirs=theirs: theirs(
                [PROMPT] * n,
                height=h,
                width=w,
                num_inference_steps=args.steps,
                generator=torch.Generator().manual_seed(0),
            )
        rows = time_calls(ways, args)
    if args.output:
        told = {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "model": args.model,
            "steps": args.steps,
            "rows": rows,
        }
        args.output.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
