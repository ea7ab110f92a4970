"""A recorded loop with a device that is played: graphs, plans and calls."""

from __future__ import annotations

import torch

from prebake.runtime.manifest import Cost, Graph, Site
from prebake.runtime.plan import Evaluation, Plan, Update
from prebake.runtime.replay import DenoiserVariant, tabulate_plan

COST = Cost(flops=0, ops=0, constants=0, constants_bytes=0)
SITES = {"s": Site(name="s", slots=2, tensors=("s:0",))}
EULER, NOISY = Update(latents=(1.0,), outputs=(-0.1,)), Update(latents=(0.9,), outputs=(-0.1, 0.05), noise=0.3)


class Device:
    """Records as a GPU does: nothing is computed until a launch, and then from what is in memory."""

    def __init__(self) -> None:
        self.recorded = self.launched = 0

    def record(self, work):
        self.recorded += 1
        made = torch.full_like(work(), float("nan"))

        def launch() -> None:
            self.launched += 1
            made.copy_(work())

        return made, launch


def variant(name, call, stores=(), combines=()):
    graph = Graph(
        name=name, package="p", inputs=(), outputs=(), constants={}, cost=COST, stores=stores, combines=combines
    )
    return DenoiserVariant(graph, call)


def full(named):
    stored = named["hidden_states"] * named["scale"]
    return {"sample": stored + named["timestep"], "s:0": stored}


def reuse(named):
    return {"sample": named["coefficients"][0, 0] * named["s:0@0"] + named["coefficients"][0, 1] * named["s:0@1"]}


VARIANTS = {"full": variant("full", full, stores=("s",)), "reuse": variant("reuse", reuse, combines=("s",))}


def tables(name: str = "p", second: Update = NOISY):
    def row(variant, step, update, **more):
        return Evaluation(step=step, variant=variant, timestep=900.0 - step, update=update, **more)

    rows = [row("full", 0, EULER), row("full", 1, second), row("reuse", 2, EULER, coefficients=(1.5, -0.5))]
    plan = Plan(name=name, steps=3, scheduler="none", evaluations=tuple(rows))
    return tabulate_plan(plan, torch.device("cpu"), 0.001)


def call(seed: int):
    """Inputs, latents and one draw."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(1, 4, 3, generator=generator) for _ in range(2))
    return {"scale": torch.randn(1, generator=generator)}, latents, [noise]


def through(loop, seed: int, over=None, **more):
    inputs, latents, noise = call(seed)
    return loop(over or tables(), VARIANTS, SITES, inputs, latents, noise=noise, **more)
