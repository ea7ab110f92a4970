"""Opens an artifact: a folder comes in, checked, with its graphs bound to one mapped copy of the weights.

The order is the point: schema, names, sizes, machine, hashes, plans; then weights; and machine code last. What comes
out is immutable and may be shared by any number of threads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import cast

import torch
from pydantic import ValidationError

from .backends import GraphModel, OpenContext, backend_module
from .check.artifact import PublicKey, Trust, open_checked_files, plan_problems
from .contract import Contract, torch_dtype
from .errors import ArtifactError, RequestError, describe_schema_error, raise_problems
from .gpu.memory import explain_gpu_memory
from .manifest import Graph, Manifest, Site, read_manifest
from .memory import explain_memory
from .offload import (
    OffloadedModel,
    OffloadedWeights,
    OffloadRequest,
    RebindableModel,
    offloadable_graphs,
    offloaded_graphs,
)
from .plan import PLAN_INPUTS_FILE, Plan
from .replay import DenoiserVariant, PlanTables, Tensors, tabulate_plan
from .runners import Runners, default_runner_count
from .storage.files import descriptor_path, read_listed_file
from .weights import map_weights


class BoundGraph:
    """A compiled graph that is ready to be called: constants bound, every call checked against the manifest."""

    def __init__(self, graph: Graph, model: GraphModel, contract: Contract):
        self.graph = graph
        self._model = model
        self._contract = contract

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """Outputs by name. Raises RequestError, naming the input, unless the inputs are exactly the manifest's."""
        return self._contract.outputs(self._model(self._contract.inputs(inputs)))

    def output_dtype(self, name: str) -> torch.dtype:
        return next(torch_dtype(spec.dtype) for spec in self.graph.outputs if spec.name == name)


@dataclass(frozen=True)
class Artifact:
    """An open artifact. `graphs` and `plans` are by name; `device` is where every tensor of a call must lie; whoever calls
    graphs from several threads holds one of `runners` meanwhile. The weights of `away` are on the device only while they run."""

    folder: Path
    manifest: Manifest
    device: torch.device
    weights: Mapping[str, torch.Tensor]
    graphs: Mapping[str, BoundGraph]
    plans: Mapping[str, Plan]
    tables: Mapping[str, PlanTables]
    runners: Runners = field(default_factory=lambda: Runners(1), compare=False)
    offloaded: tuple[str, ...] = ()
    _tails: dict[tuple[str, int], PlanTables] = field(default_factory=dict, repr=False, compare=False)

    def plan_name(self, steps: int, cache: bool) -> str:
        """The plan for that number of steps, with its cache or without. Raises RequestError with those that there are."""
        name = str(steps)
        if not cache and name in self.plans and self.plans[name].cache != "none":
            name += "-uncached"
        if name not in self.plans:
            asked = f"num_inference_steps={steps}" + ("" if cache else ", cache=False")
            raise RequestError(
                f"{asked}: the artifact has the plans {', '.join(self.plans)}; {self._way_to_plan(steps)}export again with another one"
            )
        return name

    def _way_to_plan(self, steps: int) -> str:
        """What adds a plan of that many steps, where something does."""
        extensible = any(entry.path == PLAN_INPUTS_FILE for entry in self.manifest.files)
        if not extensible or str(steps) in self.plans or steps < 1:
            return ""
        return f"`prebake plan {quote(str(self.folder))} --steps {steps}` adds one without compiling where its variants are there, or "

    def tables_from(self, name: str, step: int) -> PlanTables:
        """The tables of the plan of that name without its first `step` steps, made at their first use.

        Raises RequestError where the plan cannot begin there. Threads that ask at once get the same tables.
        """
        if step == 0:
            return self.tables[name]
        if (name, step) not in self._tails:
            tables = tabulate_plan(self.plans[name].tail(step), self.device, timestep_scale(self.manifest))
            self._tails.setdefault((name, step), tables)
        return self._tails[name, step]

    @property
    def variants(self) -> dict[str, DenoiserVariant]:
        """The denoiser's variants: the graphs that some plan calls."""
        names = {name for plan in self.plans.values() for name in plan.variants()}
        return {name: DenoiserVariant(self.graphs[name].graph, self.graphs[name]) for name in sorted(names)}

    @property
    def sites(self) -> dict[str, Site]:
        return {site.name: site for site in self.manifest.sites}

    def graph(self, name: str) -> BoundGraph:
        """The graph of that name; raises ArtifactError naming those that exist."""
        self.manifest.graph(name)
        return self.graphs[name]


def open_artifact(
    folder: str | Path,
    *,
    cache_dir: str | Path | None = None,
    trust: Trust = "hash",
    public_key: PublicKey | None = None,
    runners: int | None = None,
    offload: OffloadRequest = False,
) -> Artifact:
    """The artifact in `folder`, checked and opened. Raises ArtifactError with all that is wrong with it.

    Machine code is unpacked to `cache_dir` (default: `$XDG_CACHE_HOME/prebake`), where is noted, too, which files have been
    hashed. `trust` says what is compared before anything is opened, see `check.Trust`; `public_key` goes with "signature".
    `runners` calls may be at work at once, None = `runners.default_runner_count`; the weights of `offload` visit a GPU (`offload.py`).
    """
    folder, cache = Path(folder), Path(cache_dir) if cache_dir else None
    with explain_memory(folder):
        return _open_checked(folder, cache, trust, public_key, runners, offload)


def _open_checked(
    folder: Path,
    cache: Path | None,
    trust: Trust,
    public_key: PublicKey | None,
    count: int | None,
    offload: OffloadRequest,
) -> Artifact:
    manifest = read_manifest(folder)
    with open_checked_files(folder, manifest, trust=trust, public_key=public_key, cache_dir=cache) as files:
        plans = read_plans(folder, manifest)
        device = device_of(manifest)
        runners = Runners(default_runner_count(device) if count is None else count)
        variants = {name for plan in plans.values() for name in plan.variants()}
        away = offloaded_graphs(offload, manifest, variants)
        guests = OffloadedWeights(manifest, away, device) if away else None
        able = () if away else offloadable_graphs(manifest, variants)
        with explain_gpu_memory(folder, "weights were loaded", manifest, device, able):
            weights = map_weights(
                {folder / path: descriptor_path(files[path]) for path in weight_files(manifest)},
                device,
                manifest.channels_last,
                manifest.complex,
                guests.to_device if guests else None,
            )
            if guests:
                guests.leave()
        tables = {name: tabulate_plan(plan, device, timestep_scale(manifest)) for name, plan in plans.items()}
    graphs = open_graphs(folder, manifest, weights, device, cache, runners.count, guests)
    return Artifact(folder, manifest, device, weights, graphs, plans, tables, runners, away)


def device_of(manifest: Manifest) -> torch.device:
    """The manifest's device, a GPU with its number, as tensors on it have it: `cuda` alone is equal to no tensor's device."""
    kind = manifest.requires.device
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def timestep_scale(manifest: Manifest) -> float:
    """What the plans' timesteps are multiplied with for the denoiser. Raises ArtifactError where that is no number."""
    scale = manifest.pipeline.get("timestep_scale", 1.0)
    if not isinstance(scale, int | float) or not abs(scale) <= sys.float_info.max:
        raise ArtifactError(f"manifest.json [pipeline.timestep_scale]: {scale!r} is not a number; export again")
    return float(scale)


def read_plans(folder: Path, manifest: Manifest) -> dict[str, Plan]:
    """Every plan by name, in the manifest's order. Raises ArtifactError for one that no loop could run."""
    plans = {}
    for name, path in manifest.plans.items():
        try:
            plans[name] = Plan.model_validate_json(read_listed_file(folder, manifest, path))
        except ValidationError as e:
            raise ArtifactError(f"{describe_schema_error(folder / path, e)}; export again") from e
    raise_problems(folder, plan_problems(plans, manifest))
    return plans


def weight_files(manifest: Manifest) -> list[str]:
    return [entry.path for entry in manifest.files if entry.path.startswith("weights/")]


def open_graphs(
    folder: Path,
    manifest: Manifest,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    cache_dir: Path | None,
    runners: int = 1,
    guests: OffloadedWeights | None = None,
) -> dict[str, BoundGraph]:
    """Every graph by name, its constants bound to `weights`, those of `guests` when they are there. In the middle of it, the
    artifact's code is opened."""
    contracts = {graph.name: Contract(graph, device) for graph in manifest.graphs}
    constants = {graph.name: constants_of(graph, weights) for graph in manifest.graphs}
    visits = {g.name: guests.needed(g.constants) for g in manifest.graphs} if guests else {}
    visits = {name: needed for name, needed in visits.items() if needed}

    opening = OpenContext(folder, manifest, constants, device, cache_dir, runners, deferred_graphs=visits.keys())
    models = dict(backend_module(manifest.backend).open_models(opening))
    for name, needed in visits.items():
        models[name] = OffloadedModel(cast(RebindableModel, models[name]), constants[name], needed)
    return {graph.name: BoundGraph(graph, models[graph.name], contracts[graph.name]) for graph in manifest.graphs}


def constants_of(graph: Graph, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The graph's constants by its own names. Raises ArtifactError for a key that no weight file has."""
    if absent := sorted(key for key in graph.constants.values() if key not in weights):
        raise ArtifactError(
            f"graph {graph.name!r}: weight {absent[0]!r} is in no weight file ({len(absent)} in all); export again"
        )
    return {name: weights[key] for name, key in graph.constants.items()}
