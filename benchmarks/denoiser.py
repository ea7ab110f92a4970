"""Time per denoiser evaluation, side by side in one run: eager, torch.compile and the artifact's variants.

    python benchmarks/denoiser.py --model shapes
    python benchmarks/denoiser.py --model wide      # random weights, 205M parameters, 1024 image + 16 text tokens

Every line is timed in turn (A B C A B C ...), so that a machine whose speed drifts moves all of them alike; of one thread it
is the CPU's time, so that other programs may run meanwhile. Medians are printed, and the median over rounds of the ratio to
eager float32; --output writes all as JSON. The artifact is a real one, exported with the recipe named by --recipe; `write_wide_model` is
`shapes` with a larger transformer, and its variants come from `cache.method=pab` so that one computes every attention and
the other reuses all of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import torch

from prebake.exporter.families import flux
from prebake.exporter.load import source
from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime.artifact import Artifact, open_artifact

WIDE_CONFIG = {
    "num_layers": 3,
    "num_single_layers": 7,
    "attention_head_dim": 64,
    "num_attention_heads": 16,
    "axes_dims_rope": (8, 28, 28),
}
WIDE_DEFAULTS = (
    "[defaults]\nheight = 256\nwidth = 256\nmax_sequence_length = 16\nnum_inference_steps = 28\nguidance_scale = 3.5\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="shapes, wide, or a pipeline folder")
    parser.add_argument(
        "--base", default="shapes", help="the pipeline whose text encoders and VAE `write_wide_model` borrows"
    )
    parser.add_argument("--recipe", default="flux-fast")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=["cache.method=pab", "verify.cached_psnr_db=1"]
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--artifact", type=Path, help="where the artifact is, or else is exported to")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_wide_model(Path(scratch) / "wide", args.base) if args.model == "wide" else args.model
        folder = args.artifact or Path(scratch) / "artifact"
        if not folder.exists():
            export_variants(model, folder, args)
        found = measure_denoiser(model, open_artifact(folder), args)
    print(figures.evaluations_table(found))
    if len(found["flops"]) > 1:
        print(figures.reuse_sentence(found))
    figures.save_figures(found, args.output)


def write_wide_model(folder: Path, base: str) -> str:
    """A pipeline folder with a random transformer of 1024 width in place of the base's."""
    from diffusers import FluxTransformer2DModel

    pipe = source.load_model(base, None, {"default": torch.float32}).pipe
    torch.manual_seed(0)
    kept = {
        k: pipe.transformer.config[k]
        for k in ("patch_size", "in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
    }
    pipe.register_modules(transformer=FluxTransformer2DModel(**kept, **WIDE_CONFIG))
    pipe.save_pretrained(folder)
    (folder / "prebake.toml").write_text(WIDE_DEFAULTS, "utf-8")
    return str(folder)


def export_variants(model: str, folder: Path, args: argparse.Namespace) -> None:
    with open_progress("rich") as bar:
        export(resolve(args.recipe, args.overrides, model), folder, ExportOptions(verify=False), bar)


def measure_denoiser(model: str, artifact: Artifact, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one evaluation for each way of running it, a figure for each round, and each way's error against eager float32.

    A variant that reuses has no error of its own: what it is given was stored in the same evaluation.
    """
    size = flux.Size(
        artifact.manifest.defaults.height,
        artifact.manifest.defaults.width,
        artifact.manifest.pipeline["text"]["prompts"][1]["max_length"],
    )
    component = flux.denoiser(source.load_model(model, None, {"default": torch.float32}).pipe, size)
    half = flux.denoiser(source.load_model(model, None, {"default": torch.bfloat16}).pipe, size)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "eager float32": plain_call(component),
        "eager bfloat16": plain_call(half),
    }
    if not args.no_compile:
        ways["torch.compile float32"] = plain_call(component, torch.compile)
        ways["torch.compile bfloat16"] = plain_call(half, torch.compile)
    named = dict(zip(component.inputs, component.args, strict=True))
    costs = {name: v.graph.cost.flops for name, v in artifact.variants.items()}
    for name, variant in artifact.variants.items():
        ways[f"artifact: {name}"] = variant_call(variant, artifact, named)
    truth = ways["eager float32"]()
    errors = {
        w: float((run() - truth).norm() / truth.norm()) for w, run in ways.items()
    }  # and a round that is not counted
    clock = time.process_time if args.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, run in ways.items():
            start = clock()
            run()
            seconds[way].append(clock() - start)
    own = {f"artifact: {name}" for name in artifact.variants if name != "full"}
    return {
        "model": args.model,
        "parameters": sum(p.numel() for p in component.module.parameters()),
        "tokens": component.args[0].shape[1] + component.args[1].shape[1],
        "seconds": seconds,
        "errors": {way: error for way, error in errors.items() if way not in own},
        "flops": costs,
    }


def plain_call(component: Any, compiled: Callable[[Any], Any] = lambda module: module) -> Callable[[], torch.Tensor]:
    """diffusers' own transformer, called as FluxPipeline calls it."""
    module, transformer = component.module, compiled(component.module.transformer)
    named = dict(zip(component.inputs, component.args, strict=True))
    floats = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    inputs = {name: t.to(module.dtype) if name in floats else t for name, t in named.items()}
    ids = {"img_ids": module.image_ids, "txt_ids": module.text_ids}
    return lambda: transformer(**inputs, **ids, return_dict=False)[0].float()


def variant_call(variant: Any, artifact: Artifact, named: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """One evaluation of a variant; slots hold what the full variant computes for the same input."""
    fresh = artifact.graphs["full"](select_inputs(artifact.graphs["full"].graph, named))
    inputs = select_inputs(variant.graph, named)
    for spec in variant.graph.inputs:
        if "@" in spec.name:
            inputs[spec.name] = fresh[spec.name.partition("@")[0]]
        elif spec.name == "coefficients":
            inputs[spec.name] = torch.ones(spec.shape)
    return lambda: variant.call(inputs)["sample"]


def select_inputs(graph: Any, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The named tensors that the graph takes, in its dtypes."""
    return {s.name: named[s.name].to(getattr(torch, s.dtype)) for s in graph.inputs if s.name in named}


if __name__ == "__main__":
    main()
