"""Opens an artifact: a folder comes in, checked, with its graphs bound to one mapped copy of the weights.

The order is the point: schema, names, sizes, machine, hashes, plans; then weights; and machine code last. What comes
out is immutable and may be shared by any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import cast

import torch
from pydantic import ValidationError

from .backends import GraphModel, OpenContext, backend_module
from .bounds import MAX_PLAN_BYTES, parse_json
from .call.batches import RowByRow
from .check.artifact import PublicKey, Trust, open_checked_files, plan_problems
from .contract import Contract, RangeContract, graph_contract, torch_dtype
from .errors import ArtifactError, RequestError, describe_read_error, describe_schema_error, raise_problems
from .finite import is_finite
from .gpu.memory import explain_gpu_memory
from .manifest import PROLOGUE, STEP, Graph, Manifest, Site, batch_graph_name, read_manifest, size_graph_name
from .memory import explain_memory, trim_heap
from .offload import (
    OffloadedModel,
    OffloadedWeights,
    OffloadRequest,
    RebindableModel,
    offloadable_graphs,
    offloaded_graphs,
)
from .plan import MAX_TIMESTEP, PLAN_INPUTS_FILE, Plan, size_plan_name
from .process.default_device import CPU, default_device
from .process.fork import run_beside_fork, run_in_new_thread
from .process.self_test import refuse_wrong_arithmetic
from .process.usage import Usage
from .replay import DenoiserVariant, PlanTables, Tensors, tabulate_plan
from .runners import Runners, default_runner_count
from .storage.files import descriptor_path, read_into_page_cache, read_listed_file
from .storage.weight_files import WeightFiles, copy_files
from .weights import map_weights

KEPT_TABLES = 256
"""Tables that are made at their first use, for later starts, batches and the sizes of a range; made again beyond."""


class BoundGraph:
    """A compiled graph that is ready to be called: constants bound, every call checked against the manifest."""

    def __init__(self, graph: Graph, model: GraphModel, contract: Contract | RangeContract, usage: Usage | None = None):
        self.graph = graph
        self._usage = usage or Usage(f"graph {graph.name!r}")
        self._model = model
        self._contract = contract

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """Outputs by name. Raises RequestError, naming the input, unless the inputs are exactly the manifest's, and what
        `Usage.inside` raises."""
        with self._usage.inside():
            contract = self._contract.at_call(inputs)
            return contract.outputs(self._model(contract.inputs(inputs)))

    def close(self) -> None:
        """Lets go of its constants."""
        if close := getattr(self._model, "close", None):
            close()

    def unload(self) -> None:
        """Lets go of its machine code, from another thread than `close`."""
        model, self._model = self._model, closed_model
        if unload := getattr(model, "unload", None):
            unload()

    def output_dtype(self, name: str) -> torch.dtype:
        return next(torch_dtype(spec.dtype) for spec in self.graph.outputs if spec.name == name)


def closed_model(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a closed graph calls; `Usage` refuses before."""
    raise RequestError("the artifact was closed; load it again")


@dataclass(frozen=True)
class Artifact:
    """An open artifact. `graphs` and `plans` are by name; `device` is where every tensor of a call must lie; whoever calls
    graphs from several threads holds one of `runners` meanwhile. The weights of `away` are on the device only while they run."""

    folder: Path
    manifest: Manifest
    device: torch.device
    weights: Tensors
    graphs: Mapping[str, BoundGraph]
    plans: Mapping[str, Plan]
    tables: Mapping[str, PlanTables]
    runners: Runners = field(default_factory=lambda: Runners(1), compare=False)
    offloaded: tuple[str, ...] = ()
    mapped: WeightFiles | None = field(default=None, repr=False, compare=False)
    _tables: dict[tuple[str, int, int], PlanTables] = field(default_factory=dict, repr=False, compare=False)

    def plan_name(self, steps: int, cache: bool, size: str | None = None) -> str:
        """The plan for that number of steps, with its cache or without, at a further size of that name or the default one. Raises
        RequestError with those that there are."""
        name = size_plan_name(str(steps), size)
        if not cache and name in self.plans and self.plans[name].cache != "none":
            name = size_plan_name(f"{steps}-uncached", size)
        if name not in self.plans:
            asked = f"num_inference_steps={steps}" + ("" if cache else ", cache=False")
            raise RequestError(
                f"{asked}: the artifact has the plans {', '.join(self.plans)}; {self._way_to_plan(steps)}export again with another one"
            )
        return name

    def plan_at(self, name: str, height: int, width: int) -> str:
        """The name of that plan of the default size for pictures of another size of the artifact's range; the same one where its
        schedule does not follow the size."""
        follows = any(schedule.area == height * width for schedule in self.plans[name].areas)
        return size_plan_name(name, f"{width}x{height}") if follows else name

    def find_plan(self, name: str) -> Plan:
        """The plan of that name, or of a name that `plan_at` gave."""
        if name in self.plans:
            return self.plans[name]
        usual, _, size = name.partition("@")
        width, _, height = size.partition("x")
        return self.plans[usual].at(int(height), int(width))

    def _way_to_plan(self, steps: int) -> str:
        """What adds a plan of that many steps, where something does."""
        extensible = any(entry.path == PLAN_INPUTS_FILE for entry in self.manifest.files)
        if not extensible or str(steps) in self.plans or steps < 1:
            return ""
        return f"`prebake plan {quote(str(self.folder))} --steps {steps}` adds one without compiling where its variants are there, or "

    def tables_from(self, name: str, step: int, batch: int = 1) -> PlanTables:
        """The tables of the plan of that name without its first `step` steps, for that many pictures, made at their first use.

        Raises RequestError where the plan cannot begin there. Threads that ask at once get the same tables.
        """
        if step == 0 and batch == 1 and name in self.tables:
            return self.tables[name]
        if tables := self._tables.get((name, step, batch)):
            return tables
        plan = self.find_plan(name)
        tables = tabulate_plan(plan.tail(step) if step else plan, self.device, timestep_scale(self.manifest), batch)
        if len(self._tables) >= KEPT_TABLES:
            self._tables.clear()
        return self._tables.setdefault((name, step, batch), tables)

    def refuse_changed_weights(self) -> None:
        """Raises ArtifactError for a weight file that is mapped and was written to."""
        if self.mapped:
            self.mapped.refuse_changed()

    def close(self) -> None:
        """Waits for calls that are at work, and gives back what the artifact holds: maps, machine code, memory. Later uses
        raise RequestError, and closing again does nothing. Raises RequestError in a callback of its own call."""
        if self.runners.usage.close():
            run_in_new_thread(self._close_graphs)
            for graph in self.graphs.values():
                graph.unload()
            self.weights.clear()
            self._tables.clear()
            trim_heap()

    def _close_graphs(self) -> None:
        for graph in self.graphs.values():
            graph.close()

    @property
    def variants(self) -> dict[str, DenoiserVariant]:
        """The denoiser's variants: the graphs that some plan calls."""
        return self.batch_variants(1)

    def batch_variants(self, batch: int) -> dict[str, DenoiserVariant]:
        """Variant -> what runs it for that many pictures at once: a graph for as many, or the graph for one, row by row."""
        made = {}
        for name in sorted({name for plan in self.plans.values() for name in plan.variants()}):
            one, together = self.graphs[name], self.graphs.get(batch_graph_name(name, batch))
            made[name] = DenoiserVariant(one.graph, together or RowByRow(one, batch))
        return made

    def hoisted_graphs(self, size: str | None, batch: int) -> dict[str, DenoiserVariant]:
        """What runs before the loop for that size and so many pictures, by the graphs' plain names; by those for one, row by row, where
        there are none for as many."""
        made = {}
        for plain in (PROLOGUE, STEP):
            name = size_graph_name(plain, size)
            if one := self.graphs.get(name):
                together = self.graphs.get(batch_graph_name(name, batch))
                made[plain] = DenoiserVariant(one.graph, together or RowByRow(one, batch, steps=plain == STEP))
        return made

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
    minimum_release: int | None = None,
    runners: int | None = None,
    offload: OffloadRequest = False,
    copy: bool = False,
    warm: bool = False,
) -> Artifact:
    """The artifact in `folder`, checked and opened. Raises ArtifactError with all that is wrong with it.

    Machine code is unpacked to `cache_dir` (default: `$XDG_CACHE_HOME/prebake`), where is noted, too, which files have been
    hashed. `trust` says what is compared before anything is opened, see `check.Trust`; `public_key` and `minimum_release` go with "signature".
    `runners` calls may be at work at once, None = `runners.default_runner_count`; the weights of `offload` visit a GPU (`offload.py`).
    With `copy` weights are read into memory and not mapped; with `warm` files are read before they are mapped.
    """
    folder, cache = Path(folder), Path(cache_dir) if cache_dir else None
    with default_device(CPU), explain_memory(folder):
        run_beside_fork(refuse_wrong_arithmetic, lambda: None)
        return _open_checked(folder, cache, trust, public_key, minimum_release, runners, offload, copy, warm)


def _open_checked(
    folder: Path,
    cache: Path | None,
    trust: Trust,
    public_key: PublicKey | None,
    minimum_release: int | None,
    count: int | None,
    offload: OffloadRequest,
    copy: bool,
    warm: bool,
) -> Artifact:
    manifest = read_manifest(folder)
    with open_checked_files(
        folder, manifest, trust=trust, public_key=public_key, minimum_release=minimum_release, cache_dir=cache
    ) as files:
        plans = read_plans(folder, manifest)
        device = device_of(manifest)
        usage = Usage(folder, forkable=is_forkable(manifest))
        runners = Runners(default_runner_count(device) if count is None else count, usage)
        variants = {name for plan in plans.values() for name in plan.variants()}
        away = offloaded_graphs(offload, manifest, variants)
        guests = OffloadedWeights(manifest, away, device) if away else None
        able = () if away else offloadable_graphs(manifest, variants)
        paths = weight_files(manifest)
        if warm and not copy:
            read_weights(folder, {path: files[path] for path in paths})
        copying = copy_files(folder, manifest, files, paths) if copy else nullcontext(files)
        with explain_gpu_memory(folder, "weights were loaded", manifest, device, able), copying as opened:
            weights = map_weights(
                {folder / path: descriptor_path(opened[path]) for path in paths},
                device,
                manifest.channels_last,
                manifest.complex,
                guests.to_device if guests else None,
            )
            if guests:
                guests.leave()
        is_mapped = device.type == "cpu" and not copy
        mapped = WeightFiles(folder, manifest, {path: files[path] for path in paths} if is_mapped else {})
        tables = {name: tabulate_plan(plan, device, timestep_scale(manifest)) for name, plan in plans.items()}
        if huge := [name for name, table in tables.items() if not all(map(is_finite, table.timesteps))]:
            raise ArtifactError(
                f"{folder}: manifest.json [pipeline.timestep_scale]: makes timesteps of plan {huge[0]!r} no finite float32; export again"
            )
    # a library stays mapped for as long as a thread lives that was in it, so the thread of a server that loads is kept out
    graphs = run_in_new_thread(lambda: open_graphs(folder, manifest, weights, device, cache, runners, guests))
    return Artifact(folder, manifest, device, weights, graphs, plans, tables, runners, away, mapped)


def device_of(manifest: Manifest) -> torch.device:
    """The manifest's device, a GPU with its number, as tensors on it have it: `cuda` alone is equal to no tensor's device."""
    kind = manifest.requires.device
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def is_forkable(manifest: Manifest) -> bool:
    """Whether its graphs run in a process that was forked after they were opened."""
    return manifest.requires.device == "cpu" and getattr(backend_module(manifest.backend), "FORKABLE", False)


def timestep_scale(manifest: Manifest) -> float:
    """What the plans' timesteps are multiplied with for the denoiser. Raises ArtifactError where that is no number."""
    scale = manifest.pipeline.get("timestep_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= MAX_TIMESTEP:
        raise ArtifactError(
            f"manifest.json [pipeline.timestep_scale]: {scale!r:.80} is not a number, or not one up to {MAX_TIMESTEP:g}; export again"
        )
    return float(scale)


def read_plans(folder: Path, manifest: Manifest) -> dict[str, Plan]:
    """Every plan by name, in the manifest's order. Raises ArtifactError for one that no loop could run."""
    plans = {}
    for name, path in manifest.plans.items():
        plans[name] = parse_plan(folder / path, read_listed_file(folder, manifest, path, MAX_PLAN_BYTES))
    raise_problems(folder, plan_problems(plans, manifest))
    return plans


def parse_plan(path: Path, data: bytes) -> Plan:
    """The plan that the file `path` holds. Raises ArtifactError for what is none."""
    try:
        return Plan.model_validate(parse_json(data))
    except ValidationError as e:
        raise ArtifactError(f"{describe_schema_error(path, e)}; export again") from e
    except ValueError as e:
        raise ArtifactError(f"{path}: expected JSON, but {e}; restore the file or export again") from e


def weight_files(manifest: Manifest) -> list[str]:
    return [entry.path for entry in manifest.files if entry.path.startswith("weights/")]


def read_weights(folder: Path, files: Mapping[str, int]) -> None:
    """Reads open weight files into the page cache. Raises ArtifactError for one that cannot be read."""
    try:
        read_into_page_cache(files)
    except OSError as e:
        raise ArtifactError(f"{folder}: {e.filename}: {describe_read_error(e, folder)}") from e


def open_graphs(
    folder: Path,
    manifest: Manifest,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    cache_dir: Path | None,
    runners: Runners | None = None,
    guests: OffloadedWeights | None = None,
) -> dict[str, BoundGraph]:
    """Every graph by name, its constants bound to `weights`, those of `guests` when they are there. In the middle of it, the
    artifact's code is opened."""
    contracts = {graph.name: graph_contract(graph, device, manifest.range) for graph in manifest.graphs}
    constants = {graph.name: constants_of(graph, weights) for graph in manifest.graphs}
    visits = {g.name: guests.needed(g.constants) for g in manifest.graphs} if guests else {}
    visits = {name: needed for name, needed in visits.items() if needed}

    runners = runners or Runners(1)
    opening = OpenContext(folder, manifest, constants, device, cache_dir, runners.count, deferred_graphs=visits.keys())
    models = dict(backend_module(manifest.backend).open_models(opening))
    for name, needed in visits.items():
        models[name] = OffloadedModel(cast(RebindableModel, models[name]), constants[name], needed)
    return {g.name: BoundGraph(g, models[g.name], contracts[g.name], runners.usage) for g in manifest.graphs}


def constants_of(graph: Graph, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The graph's constants by its own names. Raises ArtifactError for a key that no weight file has."""
    if absent := sorted(key for key in graph.constants.values() if key not in weights):
        raise ArtifactError(
            f"graph {graph.name!r}: weight {absent[0]!r} is in no weight file ({len(absent)} in all); export again"
        )
    return {name: weights[key] for name, key in graph.constants.items()}
