"""What is computed before the loop: values of the prompt alone, and those of each step, for all of a plan's evaluations at once.

The exporter's `hoist/` takes them out of the denoiser's graphs, which have them as inputs instead: `prologue:0`, `step:3`, the number of
an output of the graph before the colon. A loop's inputs hold the first as they are, and of the second all evaluations' [E, ...].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..contract import SpecFacts, describe_misfits, spec_facts
from ..manifest import PROLOGUE, STEP, Graph
from ..replay import DenoiserVariant, PlanTables, Tensors


def compute_hoisted(
    hoisted: Mapping[str, DenoiserVariant], tables: PlanTables, inputs: Mapping[str, torch.Tensor]
) -> Tensors:
    """The values that a loop over `tables` takes beside its `inputs`; none where nothing is `hoisted`, by the graphs' plain names."""
    made: Tensors = {}
    if prologue := hoisted.get(PROLOGUE):
        made |= prologue.call(choose_inputs(prologue.graph, inputs))
    if step := hoisted.get(STEP):
        made |= compute_steps(step, tables.timesteps, {**inputs, **made})
    return made


def compute_steps(
    step: DenoiserVariant, timesteps: tuple[torch.Tensor, ...], inputs: Mapping[str, torch.Tensor]
) -> Tensors:
    """The step's values for every timestep [B], as many at once as the graph takes; the last are repeated to fill it."""
    count = next(spec.shape[0] for spec in step.graph.inputs if spec.name == "timestep")
    parts = []
    for begin in range(0, len(timesteps), count):
        now = timesteps[begin : begin + count]
        filled = torch.stack((*now, *now[-1:] * (count - len(now))))
        parts.append(step.call(choose_inputs(step.graph, {**inputs, "timestep": filled})))
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def choose_inputs(graph: Graph, given: Mapping[str, torch.Tensor]) -> Tensors:
    """What a graph takes, of all that there is. What it lacks its own contract names."""
    return {spec.name: given[spec.name] for spec in graph.inputs if spec.name in given}


def hoisted_facts(hoisted: Mapping[str, Graph]) -> SpecFacts:
    """Shape and dtype of each value that is passed to the loop, as one evaluation takes it."""
    facts: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, graph in hoisted.items():
        facts |= {
            n: (shape[1:] if name == STEP else shape, dtype) for n, (shape, dtype) in spec_facts(graph.outputs).items()
        }
    return facts


def hoist_problems(hoisted: Mapping[str, Graph], given: SpecFacts) -> Iterator[str]:
    """What the graphs before the loop take that a call, which gives `given`, has not; a sentence each."""
    passed = spec_facts(hoisted[PROLOGUE].outputs) if PROLOGUE in hoisted else {}
    for name, graph in hoisted.items():
        taken = dict(spec_facts(graph.inputs))
        known = {n: fact for n, fact in given.items() if n in taken and n not in ("hidden_states", "timestep")}
        if name == STEP:
            known |= {n: fact for n, fact in passed.items() if n in taken}
            shape, dtype = taken.pop("timestep", ((), "float32"))
            if len(shape) != 2 or shape[1:] != given["timestep"][0] or not shape[0] or dtype != "float32":
                yield f"[graphs.{graph.name}.inputs]: its timestep is {dtype} {list(shape)}, not float32 [E, {given['timestep'][0][0]}]"
        yield from describe_misfits(f"[graphs.{graph.name}.inputs]", known, taken)
