"""Readiness: the artifact draws here what it drew where it was exported, by its golden vectors (`exporter/verify/golden.py` writes them).

Compared are the denoiser's outputs of the default plan at each size, with the widest room that any arithmetic needs on another CPU;
`prebake verify` compares everything, by the room of each. It is also what warms the code and the weights before the first request.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from safetensors.torch import load

from ..drawing.drawing import CallGraphs
from ..drawing.request import RequestReader
from ..engine.costs import CostTable
from ..errors import ArtifactError
from ..pipeline import CALL_ARGUMENTS, Pipeline
from ..process.default_device import CPU, default_device
from ..replay import Trajectory
from ..storage.files import read_listed_file

MAX_ERROR = 0.05
MAX_GOLDEN_BYTES = 1 << 30


def replay_golden(pipe: Pipeline[Any], costs: CostTable) -> list[str]:
    """The plans that were compared; what their calls took goes to `costs`. Raises ArtifactError for one whose denoiser gives something else here than at its export."""
    artifact, compared = pipe.artifact, []
    reader, graphs = RequestReader(artifact, pipe.families, CALL_ARGUMENTS), CallGraphs(artifact, pipe.families)
    listed = {entry.path for entry in artifact.manifest.files}
    steps = artifact.manifest.defaults.num_inference_steps
    for family in pipe.families:
        name = artifact.plan_name(steps, True, family.size)
        path = f"golden/{name}.safetensors"
        if path not in listed or (family.settings.picture and family.settings.picture.required):
            continue
        stored = load(read_listed_file(artifact.folder, artifact.manifest, path, MAX_GOLDEN_BYTES))
        try:
            prompt, seed = bytes(stored["prompt"].tolist()).decode(), int(stored["seed"])
            kept, outputs = stored["evaluations"].tolist(), stored["outputs"]
        except (KeyError, ValueError) as e:
            raise ArtifactError(f"{artifact.folder}: {path}: no golden vectors of its plan; export again") from e
        request = reader.read({"prompt": prompt}, seed=seed, height=family.height, width=family.width)
        with torch.no_grad(), default_device(CPU), artifact.runners.one(), graphs.explain_memory():
            group = graphs.group(request, graphs.begin(request), slice(0, 1))
            trajectory = Trajectory(group.tables, group.inputs, group.latents, iter(group.noise))
            for e in range(kept[-1] + 1):
                variant = group.variants[request.plan.evaluations[e].variant]
                inputs, began = trajectory.evaluation_inputs(variant.graph), time.perf_counter()
                result = variant.call(inputs)
                costs.measure(variant.graph.name, 1, time.perf_counter() - began)
                trajectory.advance(variant.graph, graphs.sites, result)
                if e in kept:
                    refuse_difference(pipe, name, e, result["sample"], outputs[kept.index(e)])
        compared.append(name)
    return compared


def refuse_difference(pipe: Pipeline[Any], plan: str, e: int, made: torch.Tensor, stored: torch.Tensor) -> None:
    made, stored = made.float().cpu().reshape(-1), stored.float().reshape(-1)
    error = float((made - stored).norm() / stored.norm()) if made.shape == stored.shape else float("nan")
    if not error <= MAX_ERROR:
        raise ArtifactError(
            f"{pipe.artifact.folder}: evaluation {e} of plan {plan!r} is off by {error:.3g} of its golden vectors, {MAX_ERROR:g} is allowed; "
            f"`prebake verify {pipe.artifact.folder}` says more, or export again on this machine"
        )
