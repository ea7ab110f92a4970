"""One evaluation of a denoiser of real widths, whole and hoisted, timed in turn: milliseconds of CPU time, and bytes of weights that it
reads; and what runs before the loop in its stead. Weights are random, and nothing is downloaded.

    python benchmarks/hoist.py sd15 [--side 512] [--evaluations 50]        # Stable Diffusion 1.5's UNet, compiled
    python benchmarks/hoist.py flux --eager                                # without a compiler
    python benchmarks/hoist.py flux --rounds 0                             # what can be counted alone
    python benchmarks/hoist.py flux [--blocks 3 6] [--evaluations 28]      # FLUX.1-dev's widths, some of its 19 + 38 blocks
"""

# pyright: reportArgumentType=false
from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from real_models import UNET_BLOCKS
from torch import nn

from prebake.exporter.bench.compiled_variants import VariantCompiler
from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.cost.count import count_cost
from prebake.exporter.families import flux, sd
from prebake.exporter.families.picture import Size
from prebake.exporter.hoist.hoist import hoist_graphs
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.recipe.schema import Guidance
from prebake.exporter.sites.component import Component


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("sd15", "flux"))
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--tokens", type=int, default=512, help="of FLUX's prompt")
    parser.add_argument("--blocks", type=int, nargs=2, default=(3, 6), help="FLUX's double and single blocks")
    parser.add_argument("--evaluations", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    denoiser = unet(args, dtype) if args.model == "sd15" else transformer(args, dtype)
    whole = capture_graph("full", denoiser.module, denoiser.args, denoiser.inputs, denoiser.outputs)
    hoisted = hoist_graphs((whole,), args.evaluations)
    graphs = {"whole": whole, "hoisted": hoisted.variants[0], **{g.name: g for g in hoisted.before_loop}}
    for name, graph in graphs.items():
        print(json.dumps({"graph": name, **describe(graph)}), flush=True)
    if not args.rounds:
        return
    compiler = None if args.eager else VariantCompiler()
    runs = {name: run_of(compiler, name, graph) for name, graph in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(args.rounds + 1):
            for name, run in runs.items():
                begin = time.process_time()
                run()
                times[name].append((time.process_time() - begin) * 1e3)
    for name in graphs:
        median, least = statistics.median(times[name][1:]), min(times[name][1:])
        print(
            json.dumps({"graph": name, "cpu_ms_median": round(median, 1), "cpu_ms_least": round(least, 1)}), flush=True
        )


def describe(graph: CapturedGraph) -> dict[str, Any]:
    """What can be counted."""
    cost = count_cost(graph)
    passed = sum(math.prod(s.shape) * getattr(torch, s.dtype).itemsize for s in graph.outputs)
    return {
        "weights_mb": round(cost.constants_bytes / 1e6, 1),
        "gflop": round(cost.flops / 1e9, 2),
        "inputs": len(graph.inputs),
        "outputs_mb": round(passed / 1e6, 2),
    }


def run_of(compiler: VariantCompiler | None, name: str, graph: CapturedGraph) -> Callable[[], Any]:
    """A call of the graph, compiled where there is a compiler."""
    args = [t.contiguous() for t in graph.args]
    if compiler is None:
        return lambda: graph.gm(*args)
    model = compiler.model(graph, name)
    return lambda: model(args)


def unet(args: argparse.Namespace, dtype: torch.dtype) -> Component:
    """The UNet of Stable Diffusion 1.5, both branches at once."""
    from diffusers import UNet2DConditionModel

    model = fill(
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **UNET_BLOCKS),
        dtype,
    )
    pipe = SimpleNamespace(unet=model, vae_scale_factor=8, text_encoder=SimpleNamespace(dtype=dtype))
    return sd.denoiser(pipe, Size(args.side, args.side, 77), Guidance(branches="batched"))


def transformer(args: argparse.Namespace, dtype: torch.dtype) -> Component:
    """A FLUX transformer of few blocks."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    double, single = args.blocks
    model = fill(
        lambda: FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        dtype,
    )
    text = SimpleNamespace(dtype=dtype)
    pipe = SimpleNamespace(
        transformer=model,
        vae_scale_factor=8,
        text_encoder=text,
        text_encoder_2=text,
        _prepare_latent_image_ids=FluxPipeline._prepare_latent_image_ids,
    )
    return flux.denoiser(pipe, Size(args.side, args.side, args.tokens))


def fill(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The model with weights of one drawn block of numbers, over and over."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = build()
    torch.set_default_dtype(torch.float32)
    model = model.to_empty(device="cpu").eval()
    for tensor in model.parameters():
        tensor.requires_grad_(False)
    block = (torch.randn(1 << 22) * 0.02).to(dtype)
    with torch.no_grad():
        for tensor in model.parameters():
            flat = tensor.view(-1)
            for begin in range(0, len(flat), len(block)):
                part = flat[begin : begin + len(block)]
                part.copy_(block[: len(part)])
    return model


if __name__ == "__main__":
    main()
