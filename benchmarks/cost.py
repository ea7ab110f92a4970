"""Does the cost model tell the truth? Predicted and measured time of each denoiser variant of an artifact.

    python benchmarks/cost.py artifacts/flux-fast-shapes --model shapes

Predictions come from the captured graphs and from this machine's rates (`exporter/cost/machine_rates.py`), which are
measured where they are not known; nothing of the artifact is run for them. Then its variants take turns (A B A B ...). Medians; the share is of the variant that computes everything.
With one thread, the time is that of this process on its core, so other processes do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from denoiser import variant_call

from prebake.exporter.cost.forecast import build_rates
from prebake.exporter.pipeline import prepare
from prebake.exporter.progress import open_progress
from prebake.exporter.verify.source_pipeline import manifest_recipe
from prebake.runtime.artifact import Artifact, open_artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", required=True, help="shapes, or the pipeline folder that the artifact was made of")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    artifact = open_artifact(args.artifact)
    recipe = manifest_recipe(args.artifact, artifact.manifest)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"id": args.model})})
    with open_progress("quiet") as quiet:
        prepared = prepare(recipe, quiet, near=args.artifact)
    figures = compare_costs(prepared, artifact, args.repeats)
    print_costs(figures)
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", "utf-8")


def compare_costs(prepared: Any, artifact: Artifact, repeats: int) -> dict[str, Any]:
    """Variant -> predicted milliseconds by class, and the measured median."""
    measured = time_artifact_variants(prepared, artifact, repeats)
    speed = build_rates(prepared.recipe.compile, prepared.backend)
    found: dict[str, Any] = {}
    for graph in prepared.graphs["denoiser"]:
        counted = prepared.censuses[graph.name]
        start = time.perf_counter()
        forecast = speed.forecast(counted, prepared.costs[graph.name].constants_bytes)
        found[graph.name] = {
            "predicted_ms": forecast.ms,
            "by_class_ms": {**forecast.heavy_ms, "loops": forecast.loops_ms},
            "measured_ms": measured[graph.name],
            "flops": counted.flops,
            "loops": {
                "count": len(counted.loops),
                "bytes": counted.moved_bytes,
                "values": sum(loop.values for loop in counted.loops),
            },
            "probe_s": time.perf_counter() - start,
        }
    for figures in found.values():
        for what in ("predicted_ms", "measured_ms", "flops"):
            figures[f"{what.removesuffix('_ms')}_share"] = figures[what] / found["full"][what]
    return found


def time_artifact_variants(prepared: Any, artifact: Artifact, repeats: int) -> dict[str, float]:
    """Median milliseconds of an evaluation of each variant; the variants take turns."""
    component = prepared.part.denoisers(prepared.recipe, prepared.backend)[0]
    named = dict(zip(component.inputs, component.args, strict=True))
    runs = {name: variant_call(variant, artifact, named) for name, variant in artifact.variants.items()}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def print_costs(figures: dict[str, Any]) -> None:
    print(
        f"{'variant':16s}{'measured ms':>12s}{'predicted':>11s}{'share':>8s}{'predicted':>11s}{'off by':>8s}{'FLOPs':>8s}"
    )
    for name, f in figures.items():
        off = f["predicted_share"] / f["measured_share"] - 1
        print(
            f"{name:16s}{f['measured_ms']:12.2f}{f['predicted_ms']:11.2f}{f['measured_share']:8.3f}"
            f"{f['predicted_share']:11.3f}{off:8.1%}{f['flops_share']:8.3f}"
        )
        parts = ", ".join(f"{label} {ms:.2f}" for label, ms in f["by_class_ms"].items())
        loops = f["loops"]
        print(
            f"{'':16s}{parts} ms; {loops['count']} loops, {loops['bytes'] / 1e6:.1f} MB, {loops['values'] / 1e6:.1f}M values"
        )


if __name__ == "__main__":
    main()
