"""Is a cached schedule worth it? PSNR against the full number of steps, for caches and for fewer steps without one.

    python benchmarks/caches.py --prompts 12

Float32, eager, so that nothing but the schedule differs; `shapes`' underspecified prompts, whose trajectories bend as a
real model's do, with seed = line number. `computed` is the number of evaluations that run the transformer blocks.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

import prebake.exporter.shapes
from prebake.exporter import source
from prebake.exporter.discover import discover
from prebake.exporter.eager import eager_replay
from prebake.exporter.families import flux
from prebake.exporter.plan import plan
from prebake.exporter.plan.sampler import tabulate
from prebake.exporter.quality import psnr_db
from prebake.exporter.recipe import Cache, Mask, NoCache, PyramidAttentionBroadcast
from prebake.runtime.families.flux import draw_latents

PROMPTS = Path(prebake.exporter.shapes.__file__).parent / "prompts" / "underspecified.txt"
FEWER_STEPS = (21, 18, 14, 12, 11, 9, 8)
MASKS = (
    ("11(01)", 0),
    ("11(01)", 1),
    ("111(01)", 1),
    ("111(001)", 1),
    ("1111(001)", 1),
    ("11111(001)", 1),
    ("1111(0001)", 1),
    ("11111(0001)", 1),
)


class Trial:
    """One model, some prompts: every schedule is drawn from the same noise."""

    def __init__(self, model: str, prompts: list[str]) -> None:
        self.pipe = source.load(model, None, {"default": torch.float32}).pipe
        self.size = flux.Size(64, 64, 16)
        self.denoiser = flux.denoiser(self.pipe, self.size)
        self.decoder = flux.others(self.pipe, self.size, channels_last=False)[-1].module
        self.layout = discover(self.denoiser)
        shape = tuple(flux.facts(self.pipe, self.size)["latents_shape"])
        self.noise = [draw_latents(shape, 1, torch.Generator().manual_seed(i)) for i in range(len(prompts))]
        self.inputs = [self.encode(prompt) for prompt in prompts]

    def encode(self, prompt: str) -> dict[str, torch.Tensor]:
        states, pooled, _ = self.pipe.encode_prompt(prompt, prompt, max_sequence_length=self.size.tokens)
        named = {"encoder_hidden_states": states, "pooled_projections": pooled, "guidance": torch.tensor([3.5])}
        return {name: named[name] for name in self.denoiser.inputs if name in named}

    def draw(self, cache: Cache, steps: int) -> tuple[list[torch.Tensor], int]:
        """The pictures, and how many of the plan's evaluations compute everything."""
        table = tabulate(self.pipe.scheduler, steps, **flux.scheduler_arguments(self.pipe, self.size, steps))
        planned = plan(cache, self.layout, {steps: table})
        pairs = zip(self.inputs, self.noise, strict=True)
        chosen = planned.plans[0]
        drawn = [eager_replay(self.denoiser, planned, chosen, i, x, timestep_scale=1e-3) for i, x in pairs]
        return [self.decoder(x)[0] for x in drawn], sum(e.variant == "full" for e in chosen.evaluations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=28)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    prompts = PROMPTS.read_text("utf-8").splitlines()[: args.prompts]
    trial = Trial(args.model, prompts)
    truth, _ = trial.draw(NoCache(), args.steps)
    print(f"{args.model}, {args.steps} steps, {len(prompts)} prompts, mean PSNR")

    def report(name: str, cache: Cache, steps: int) -> None:
        pictures, computed = trial.draw(cache, steps)
        decibels = statistics.fmean(psnr_db(a, b) for a, b in zip(pictures, truth, strict=True))
        print(f"{name:32s} {computed:3d} computed {decibels:6.1f} dB", flush=True)

    for steps in FEWER_STEPS:
        report(f"{steps} steps, no cache", NoCache(), steps)
    for mask, order in MASKS:
        report(f"mask {mask}, order {order}", Mask(mask=mask, order=order), args.steps)
    for every in (2, 3):
        broad = PyramidAttentionBroadcast(
            spatial_attention_block_skip_range=every, spatial_attention_timestep_skip_range=(0, 1000)
        )
        report(f"pab every {every}, attention only", broad, args.steps)


if __name__ == "__main__":
    main()
