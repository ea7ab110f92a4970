"""CPU time per denoiser evaluation of ONNX Runtime, float32 and int8, prepacked and not, beside AOTInductor's int8.

    python benchmarks/backends.py                  # `write_wide_model` of denoiser.py; writes and reads 5 GB under $TMPDIR

Every line is an artifact of its own, exported with flux-fast's fusions and int8 layers, all of them open in one process on one
thread. They take turns, after one round that is not counted; what is printed is the median of each one's CPU seconds, the median
over rounds of float32's time to its own with its range, and its error against eager float32. CPU time, so that other programs may
run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from denoiser import export_variants, variant_call, write_wide_model

from prebake.exporter.families import flux
from prebake.exporter.load import source
from prebake.exporter.sites.component import Component
from prebake.runtime.artifact import open_artifact
from prebake.runtime.manifest import Manifest

PLAIN_PARTS = ("denoiser", "text_encoders", "vae")
INT8, FLOAT = "quantize.method=int8_dynamic", "quantize.method=none"
ORT, AOTI, UNPACKED = "compile.backend=onnxruntime", "compile.backend=aoti", "compile.options.prepack=false"
WAYS = {
    "float32": (ORT, FLOAT),
    "float32, `prepack=false`": (ORT, FLOAT, UNPACKED),
    "int8": (ORT, INT8),
    "int8, `opset=23`": (ORT, INT8, "compile.options.opset=23"),
    "int8, `prepack=false`": (ORT, INT8, UNPACKED),
    "int8 by AOTInductor": (AOTI, INT8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default="shapes", help="the pipeline whose text encoders and VAE `write_wide_model` borrows"
    )
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_wide_model(Path(scratch) / "wide", args.base)
        folders = {way: export_way(Path(scratch) / str(i), model, WAYS[way]) for i, way in enumerate(WAYS)}
        print_backends(*measure_backends(model, folders, args.repeats))


def export_way(folder: Path, model: str, overrides: tuple[str, ...]) -> Path:
    common = ("cache.method=none", *(f"precision.{part}=float32" for part in PLAIN_PARTS))
    export_variants(model, folder, argparse.Namespace(recipe="flux-fast", overrides=[*common, *overrides]))
    return folder


def measure_backends(
    model: str, folders: dict[str, Path], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Each way's CPU seconds, a figure for each round, and its relative error in L2."""
    artifacts = {way: open_artifact(folder) for way, folder in folders.items()}
    component = build_example(model, next(iter(artifacts.values())).manifest)
    named = dict(zip(component.inputs, component.args, strict=True))
    truth = component.module(*component.args)
    calls = {way: variant_call(artifact.variants["full"], artifact, named) for way, artifact in artifacts.items()}
    errors = {way: float((run() - truth).norm() / truth.norm()) for way, run in calls.items()}
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(repeats):
        for way, run in calls.items():
            start = time.process_time()
            run()
            seconds[way].append(time.process_time() - start)
    return seconds, errors


def build_example(model: str, manifest: Manifest) -> Component:
    """diffusers' transformer in float32, with inputs for one evaluation."""
    size = flux.Size(
        manifest.defaults.height, manifest.defaults.width, manifest.pipeline["text"]["prompts"][1]["max_length"]
    )
    return flux.denoiser(source.load_model(model, None, {"default": torch.float32}).pipe, size)


def print_backends(seconds: dict[str, list[float]], errors: dict[str, float]) -> None:
    print("| | s | float32's time / this | error against eager float32 |\n| --- | --- | --- | --- |")
    base = seconds["float32"]
    for way, mine in seconds.items():
        ratios = sorted(b / m for b, m in zip(base, mine, strict=True))
        spread = "" if mine is base else f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(
            f"| {way} | {statistics.median(mine):.2f} | {statistics.median(ratios):.2f}{spread} | {errors[way]:.1e} |"
        )


if __name__ == "__main__":
    main()
