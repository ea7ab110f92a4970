"""What runs before the loop: once a group of pictures, for all evaluations at once, with the same result as in the loop."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from prebake.exporter.calibrators.eager_replay import ZERO_COST
from prebake.exporter.verify.closeness import relative_error
from prebake.runtime.call.hoist import compute_hoisted, compute_steps
from prebake.runtime.families.call_contract import call_problems
from prebake.runtime.manifest import Graph, TensorSpec
from prebake.runtime.pipeline import Pipeline
from prebake.runtime.plan import Evaluation, Plan, Update
from prebake.runtime.replay import DenoiserVariant, loop_inputs, tabulate_plan
from support import family_parity as parity

HOIST = "compile.hoist=true"
TOLERANCE = 1e-5
"""Relative, in L2, on latents: as in `family_parity`."""


def graph(name: str, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> Graph:
    taken, given = (
        tuple(TensorSpec(name=n, shape=shape, dtype="float32") for n, shape in specs.items())
        for specs in (inputs, outputs)
    )
    return Graph(name=name, package="", inputs=taken, outputs=given, constants={}, cost=ZERO_COST)


STEP_GRAPH = graph("step", {"timestep": (2, 1), "prologue:0": (1, 3)}, {"step:0": (2, 1, 3)})
PROLOGUE_GRAPH = graph("prologue", {"text": (1, 3)}, {"prologue:0": (1, 3)})


def test_steps_are_computed_as_many_at_once_as_the_graph_takes_and_the_last_are_filled():
    seen = []

    def call(given):
        seen.append(given["timestep"].flatten().tolist())
        return {"step:0": given["timestep"][:, :, None] * given["prologue:0"]}

    timesteps = tuple(torch.tensor([t]) for t in (5.0, 4.0, 3.0, 2.0, 1.0))
    inputs = {"prologue:0": torch.ones(1, 3), "text": torch.ones(1, 3)}
    made = compute_steps(DenoiserVariant(STEP_GRAPH, call), timesteps, inputs)
    assert seen == [[5, 4], [3, 2], [1, 1]]
    assert torch.equal(made["step:0"][:5, 0, 0], torch.tensor([5.0, 4, 3, 2, 1]))


def test_the_prologue_runs_once_and_the_step_reads_what_it_gives():
    update = Update(latents=(1.0,), outputs=(1.0,))
    evaluations = tuple(Evaluation(step=i, variant="full", timestep=9.0 - i, update=update) for i in range(2))
    plan = Plan(
        name="2", steps=2, cache="none", scheduler="S", init_noise_sigma=1.0, sigmas=(), evaluations=evaluations
    )
    hoisted = {
        "prologue": DenoiserVariant(PROLOGUE_GRAPH, lambda given: {"prologue:0": given["text"] * 2}),
        "step": DenoiserVariant(
            STEP_GRAPH, lambda given: {"step:0": given["timestep"][:, :, None] * given["prologue:0"]}
        ),
    }
    tables = tabulate_plan(plan, torch.device("cpu"))
    made = compute_hoisted(hoisted, tables, {"text": torch.ones(1, 3), "other": torch.ones(1)})
    assert made.keys() == {"prologue:0", "step:0"}
    full = graph("full", {"text": (1, 3), "step:0": (1, 3)}, {})
    taken = loop_inputs(full, {"text": torch.ones(1, 3), **made}, 1)
    assert taken.keys() == {"text", "step:0"}
    assert torch.equal(taken["step:0"], torch.full((1, 3), 16.0))


CALLS = {
    "flux": ((), {}),
    "sd": (("guidance.branches=batched",), {"negative_prompt": "snow"}),
    "pixart": (("cache.method=fora", "cache.interval=2"), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_draws_what_it_draws_unhoisted(name):
    overrides, call = CALLS[name]
    call = {"seed": 3, "output_type": "latent", **call}
    whole, hoisted = (parity.ours(name, *overrides, *more) for more in ((), (HOIST,)))
    names = {g.name for g in hoisted.artifact.manifest.graphs}
    assert names >= {"prologue", "step"}
    assert not {g.name for g in whole.artifact.manifest.graphs} & {"prologue", "step"}
    assert relative_error(hoisted("a red circle", **call).images, whole("a red circle", **call).images) <= TOLERANCE


def test_a_callback_that_changes_the_guidance_is_heard():
    """Guidance is joined in the loop."""

    def changed(pipe, step, _timestep, _tensors):
        pipe._guidance_scale = 2.0 + step
        return {}

    call = {"seed": 3, "output_type": "latent", "negative_prompt": "snow", "callback_on_step_end": changed}
    overrides, _ = CALLS["sd"]
    whole, hoisted = (parity.ours("sd", *overrides, *more) for more in ((), (HOIST,)))
    plain = {**call, "callback_on_step_end": None}
    got = hoisted("a red circle", **call).images
    assert relative_error(got, whole("a red circle", **call).images) <= TOLERANCE
    assert relative_error(got, hoisted("a red circle", **plain).images) > 100 * TOLERANCE


def test_pictures_that_go_through_the_loop_together_are_to_the_bit_what_they_are_alone():
    """Without graphs for two: prologue and step run for each, and the loop has the values of both."""
    artifact = parity.ours("flux", HOIST).artifact
    both = Pipeline(replace(artifact, manifest=artifact.manifest.model_copy(update={"batches": (1, 2)})))
    prompts, call = ["a red circle", "snow"], {"output_type": "latent"}
    seeds = [torch.Generator().manual_seed(i) for i in (3, 4)]
    together = both(prompts, generator=seeds, **call).images
    for prompt, seed, drawn in zip(prompts, (3, 4), together, strict=True):
        assert torch.equal(parity.ours("flux", HOIST)(prompt, seed=seed, **call).images[0], drawn)


DAMAGES = {
    "a value that nobody computes": ("prologue", {"outputs": ()}, "which no call knows"),
    "a prologue that reads latents": ("prologue", {"inputs": "hidden_states"}, "'hidden_states'"),
    "a step of one timestep": ("step", {"inputs": "timestep"}, "float32 [E, 1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_graphs_before_the_loop_that_do_not_fit_are_named(damage):
    name, change, said = DAMAGES[damage]
    pipe = parity.ours("flux", HOIST)
    artifact = pipe.artifact
    graph = artifact.graph(name).graph
    if isinstance(change.get("inputs"), str):
        kept = tuple(s for s in graph.inputs if s.name != change["inputs"])
        change = {"inputs": (*kept, TensorSpec(name=change["inputs"], shape=(1,), dtype="float32"))}
    damaged = copy.copy(artifact.graphs[name])
    damaged.graph = graph.model_copy(update=change)
    broken = replace(artifact, graphs={**artifact.graphs, name: damaged})
    problems = list(call_problems(broken, pipe.families[0]))
    assert any(said in problem for problem in problems), problems
    assert not list(call_problems(artifact, pipe.families[0]))
