"""What the units of the gate are on a model, and what canaries come to in them: docs/explanation/gate.md has its figures.

    python benchmarks/gate.py --recipe flux-fast --model shapes --int8 --pictures 16
    python benchmarks/gate.py --recipe sd-fast --model shapes-sd --int8 --pictures 8
    python benchmarks/gate.py --recipe sd-fast --model FOLDER --size 256x256 --evaluations 3   # FOLDER of real_models.py sd15

All in eager, at the inputs of one eager float32 trajectory: the loss of bfloat16, that of int8 layers in float32, and that of one layer changed
in a way that an artifact could be broken. Times are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prebake.exporter.calibrators.dynamic_replay import SamplerLoop
from prebake.exporter.families.registry import find_family
from prebake.exporter.load.prompts import picture_prompts
from prebake.exporter.lower import load_backend
from prebake.exporter.progress import Progress
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.rewrite import DENOISER_COMPONENTS, rewrite_denoiser
from prebake.exporter.settle import load_pipeline, sampler_table, settle
from prebake.exporter.verify.bfloat16 import eager_bfloat16
from prebake.exporter.verify.budget import spread
from prebake.exporter.verify.closeness import psnr_db, relative_error
from prebake.exporter.verify.loss import picture_loss
from prebake.exporter.verify.reference import cast_components

PLAIN = ("cache.method=none", "precision.denoiser=float32", "precision.text_encoders=float32", "precision.vae=float32")
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "scale x 1.1": lambda w: 1.1 * w,
    "scale x 2": lambda w: 2 * w,
    "first row negated": lambda w: torch.cat((-w[:1], w[1:])),
    "rows rolled": lambda w: w.roll(1, 0),
}


class Eager:
    """A pipeline in eager, and one trajectory of it: what its denoiser is given at each evaluation, and returns."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.loaded = load_pipeline(recipe, {"default": torch.float32})
        self.pipe, self.family = self.loaded.pipe, find_family(self.loaded.pipe)
        self.defaults, self.size, (self.steps, *_) = settle(recipe, self.family, self.loaded)
        self.name = next(name for name in DENOISER_COMPONENTS if name in self.pipe.components)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.name)

    @torch.no_grad()
    def evaluate(self, given: dict[str, Tensor]) -> Tensor:
        component = self.family.denoiser(self.pipe, self.size, self.recipe.guidance)
        args = [given[n].to(like.dtype) for n, like in zip(component.inputs, component.args, strict=True)]
        return component.module(*args)

    @torch.no_grad()
    def trajectory(self, prompt: str, evaluations: int) -> list[tuple[float, dict[str, Tensor], Tensor]]:
        """Timestep, inputs and output of evaluations that are evenly spread; where they are few, latents of pure noise at each."""
        table = sampler_table(self.family, self.pipe, self.size, self.steps, Progress())
        scale = self.family.facts(self.pipe, self.size)["timestep_scale"]
        generator = torch.Generator().manual_seed(0)
        inputs = self.family.encode(self.pipe, self.size, prompt, self.defaults.guidance_scale, self.recipe.guidance)
        latents = self.family.noise(self.pipe, self.size, generator) * table.init_noise_sigma
        noise = iter(lambda: torch.randn(latents.shape, generator=generator), None)
        loop = SamplerLoop(table, inputs, latents, timestep_scale=scale, noise=noise)
        kept = set(spread(range(len(table.updates)), evaluations))
        found = []
        while loop.e < len(table.updates):
            e, given = loop.e, loop.inputs()
            if e in kept or evaluations >= 5:
                output = self.evaluate(given)
                found += [(table.timesteps[e], given, output)] if e in kept else []
            else:
                output = torch.zeros_like(latents)
            loop.advance(output)
        return found

    @torch.no_grad()
    def draw(self, prompt: str, seed: int) -> Tensor:
        scale = self.defaults.guidance_scale
        return self.family.draw(self.pipe, prompt, seed, self.steps, scale, self.size)[1].float()


@contextmanager
def change_weight(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The weight is another one inside."""
    kept = weight.detach().clone()
    weight.data.copy_(change(kept))
    try:
        yield
    finally:
        weight.data.copy_(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="flux-fast")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--size", help="width x height, in place of the model's")
    parser.add_argument("--evaluations", type=int, default=10, help="that are compared")
    parser.add_argument(
        "--pictures", type=int, default=0, help="drawn in float32, bfloat16 and, if asked for, with int8 layers"
    )
    parser.add_argument("--int8", action="store_true", help="int8 layers too, in a second copy of the model")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    sizes = (f"shapes.sizes={args.size}",) if args.size else ()
    steps = (f"sampler.steps={args.steps}",) if args.steps else ()
    recipe = resolve(args.recipe, (*PLAIN, *sizes, *steps), args.model)
    eager = Eager(recipe)
    prompt = picture_prompts(recipe)[0]
    start = time.process_time()
    trajectory = eager.trajectory(prompt, args.evaluations)
    print(
        f"float32 trajectory: {time.process_time() - start:.1f} CPU s, {len(trajectory)} evaluations kept", flush=True
    )

    def errors(model: Eager) -> list[float]:
        return [relative_error(model.evaluate(given).float(), output) for _, given, output in trajectory]

    canaries = {}
    for where, layer in attention_layers(eager.denoiser):
        for what, change in CHANGES.items():
            with change_weight(layer.weight, change):
                canaries[f"{where}, {what}"] = errors(eager)
    pictures = [(prompt, seed) for seed in range(4) for prompt in picture_prompts(recipe)][: args.pictures]
    exact = [eager.draw(*job) for job in pictures]
    spreads = {}
    if args.int8:
        eight = Eager(resolve(args.recipe, (*PLAIN, *sizes, *steps, "quantize.method=int8_dynamic"), args.model))
        rewrite_denoiser(eight.name, eight.denoiser, eight.recipe, load_backend("aoti"), Progress())
        canaries = {"int8 layers": errors(eight)} | canaries
        spreads["int8 layers"] = [psnr_db(eight.draw(*job), image) for job, image in zip(pictures, exact, strict=True)]
        del eight
    cast_components(eager.pipe, torch.bfloat16)
    with eager_bfloat16():
        start = time.process_time()
        loss = errors(eager)
        print(f"bfloat16: {(time.process_time() - start) / len(loss):.2f} CPU s an evaluation", flush=True)
        spreads["bfloat16"] = [psnr_db(eager.draw(*job), image) for job, image in zip(pictures, exact, strict=True)]
    report(trajectory, loss, canaries, spreads)


def attention_layers(denoiser: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The first, middle and last Linear in an attention."""
    every = [(n, m) for n, m in denoiser.named_modules() if isinstance(m, nn.Linear) and "attn" in n]
    return [every[0], every[len(every) // 2], every[-1]]


def report(
    trajectory: Sequence[tuple[float, Any, Any]],
    loss: Sequence[float],
    canaries: dict[str, list[float]],
    spreads: dict[str, list[float]],
) -> None:
    print("| timestep | " + " | ".join(f"{t:.0f}" for t, _, _ in trajectory) + " |")
    print("| bfloat16 loses | " + " | ".join(f"{x:.4f}" for x in loss) + " |")
    for name, found in canaries.items():
        ratios = [a / b for a, b in zip(found, loss, strict=True)]
        print(f"| {name} | mean {statistics.fmean(ratios):.2f} | worst {max(ratios):.2f} |")
    unit = [picture_loss(db) for db in spreads["bfloat16"]]
    for name, found in spreads.items():
        if found:
            rms = [picture_loss(db) for db in found]
            mean, worst = statistics.fmean(rms) / statistics.fmean(unit), max(rms) / max(unit)
            db = f"PSNR {statistics.fmean(found):.1f} dB, worst {min(found):.1f}"
            print(f"| pictures, {name} | mean {mean:.2f} | worst {worst:.2f} | {db} |")


if __name__ == "__main__":
    main()
