"""Does DeepCache's reuse variant save the time that its FLOPs promise? Both variants of a UNet, compiled, run in turn.

    python benchmarks/deepcache.py
    python benchmarks/deepcache.py --widths 192 384 768 768 --text 768

A random UNet in Stable Diffusion 1.5's structure, float32, batch 1, 77 text tokens, one thread. Prints for each branch id
the share of the full variant's FLOPs, and of its time: the median over pairs of neighbouring runs, with the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from prebake.exporter.bench.compiled_variants import VariantCompiler
from prebake.exporter.caches import DeepCache
from prebake.exporter.capture.variants import capture_variants
from prebake.exporter.cost.count import count_cost
from prebake.exporter.plan import make_plans
from prebake.exporter.plan.sampler import tabulate_scheduler
from prebake.exporter.progress import open_progress
from prebake.exporter.sites.component import Component
from prebake.exporter.sites.discover import discover_layout


class FlatUNet(nn.Module):
    """The UNet as a function of flat tensors."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]


def build_denoiser(widths: tuple[int, ...], latent: int, text: int) -> Component:
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=latent, block_out_channels=widths, cross_attention_dim=text, attention_head_dim=8
    )
    unet.to(memory_format=torch.channels_last)  # as an export does: else kernels are reordered at every call
    args = {
        "hidden_states": torch.randn(1, 4, latent, latent),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 77, text),
    }
    return Component("denoiser", FlatUNet(unet).eval(), tuple(args), ("sample",), tuple(args.values()), {"": "unet."})


def call_seconds(call, inputs: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    call(inputs)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs=4, default=(128, 256, 512, 512))
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--text", type=int, default=512, help="width of the text states")
    parser.add_argument("--branches", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    component = build_denoiser(tuple(args.widths), args.latent, args.text)
    layout, compiled = discover_layout(component), VariantCompiler()
    tables = {4: tabulate_scheduler(DDIMScheduler(clip_sample=False), 4)}
    print(f"widths {tuple(args.widths)}, latent {args.latent} x {args.latent}, {args.pairs} pairs of runs")
    for branch in args.branches:
        planned = make_plans(DeepCache(cache_interval=2, cache_branch_id=branch), layout, tables)
        with open_progress("quiet") as quiet:
            full_cost, reuse_cost = (count_cost(g) for g in capture_variants(component, planned, quiet)[1])
        _, variants = compiled.variants(component, planned)
        inputs = dict(zip(component.inputs, component.args, strict=True))
        full, reuse = variants["full"].call, variants["reuse"].call
        (tensor,) = planned.marks[0].tensors
        stored = {**inputs, f"{tensor}@0": full(inputs)[tensor], "coefficients": torch.ones(1)}
        for _ in range(3):
            full(inputs)
            reuse(stored)
        pairs = [(call_seconds(full, inputs), call_seconds(reuse, stored)) for _ in range(args.pairs)]
        low, share, high = statistics.quantiles([r / f for f, r in pairs], n=4)
        flops = reuse_cost.flops / full_cost.flops
        print(
            f"branch {branch} ({planned.marks[0].name}): {flops:.3f} of the FLOPs, {share:.3f} of the time "
            f"[{low:.3f} {high:.3f}], time / FLOPs {share / flops:.2f}; "
            f"full {1e3 * statistics.median(f for f, _ in pairs):.1f} ms, "
            f"reuse {1e3 * statistics.median(r for _, r in pairs):.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
