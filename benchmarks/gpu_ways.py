"""One stage of `gpu.py`: a model, a way of running it and a cache come in, figures go out.

Every way runs the same plan: eager modules, the same captured graphs under torch.compile, or the artifact that prebake
exports. A way's variants are called by `runtime/replay.py`'s loop, so that what a picture takes is what it takes there.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import GpuModel, build_pipeline, model_cache, model_size
from gpu_times import StagePlace, StageSubject, Variants, matmul_rate, synchronize, time_variants

FLUX_FAST_FLAGS = {
    "conv_1x1_as_mm": True,
    "epilogue_fusion": False,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
}
"""Inductor's flags of huggingface/flux-fast, utils/pipeline_utils.py."""
WAY_QUANTIZE_METHODS = {"prebake-bf16": "none", "prebake-int8": "int8_dynamic", "prebake-fp8": "fp8_dynamic"}
MIN_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Stage:
    """`way` is eager, compile, flux-fast, or a key of QUANTIZE."""

    model: GpuModel
    way: str
    cache: str

    @property
    def name(self) -> str:
        return f"{self.model.name}/{self.way}/{self.cache}"


def missing_requirement(stage: Stage, cuda: bool, compile_on_cpu: bool = False) -> str | None:
    """Why the stage cannot run here, or None."""
    modules = ["diffusers", "transformers", "tokenizers", "pydantic", "safetensors"]
    if stage.way == "flux-fast":
        modules.append("torchao")
    if missing := [m for m in modules if importlib.util.find_spec(m) is None]:
        return f"{', '.join(missing)} not installed"
    on_cpu = not stage.model.config and (stage.way == "eager" or (compile_on_cpu and stage.way == "prebake-bf16"))
    if not cuda:
        return None if on_cpu else "no CUDA device that this torch can use"
    if stage.way in ("flux-fast", "prebake-fp8") and torch.cuda.get_device_capability() < MIN_FP8_CAPABILITY:
        return "fp8 needs compute capability 8.9, this GPU has {}.{}".format(*torch.cuda.get_device_capability())
    return None


def measure_stage(stage: Stage, place: StagePlace) -> dict[str, Any]:
    """Times in milliseconds and seconds, bytes and FLOPs of one stage; the machine's matmul rate is measured first."""
    torch.set_grad_enabled(False)
    rate = matmul_rate(place.device)
    made: dict[str, Any] = {"matmul_flops_per_s": rate}
    if stage.way.startswith("prebake"):
        return made | measure_artifact_stage(stage, place, rate)
    begun = time.perf_counter()
    subject = prepare_subject(stage, place, on_device=True, fused=stage.way == "flux-fast")
    variants = eager_stage_variants(stage, subject) if stage.way == "eager" else compiled_stage_variants(stage, subject)
    made["prepare_s"] = time.perf_counter() - begun
    return made | time_variants(subject, variants, place, rate)


# --- the model ------------------------------------------------------------------------------------------------------


def prepare_subject(
    stage: Stage, place: StagePlace, *, on_device: bool, fused: bool = False, rewrite: Any = None
) -> StageSubject:
    """The denoiser and its plan. Graphs for an artifact are captured on the CPU, where an export captures them."""
    from prebake.exporter.families.registry import find_family
    from prebake.exporter.plan import make_plans
    from prebake.exporter.progress import open_progress
    from prebake.exporter.settle import sampler_table
    from prebake.exporter.sites.discover import discover_layout

    pipe = build_pipeline(stage.model, place.device, torch.bfloat16)
    model = getattr(pipe, "unet", None) or pipe.transformer
    if fused:
        model.fuse_qkv_projections()
        quantize_float8(model)
    if rewrite:
        rewrite(pipe)  # where the model is: quantizing 12 billion weights on a CPU takes minutes
    if not on_device:
        model.cpu()
    family = find_family(pipe)
    size = model_size(stage.model, family, pipe)
    denoiser = family.denoiser(pipe, size)
    if on_device:
        there = tuple(a.to(place.device) for a in denoiser.args)
        denoiser = replace(denoiser, module=denoiser.module.to(place.device), args=there)
    layout = discover_layout(denoiser)
    with open_progress("quiet") as quiet:
        table = sampler_table(family, pipe, size, stage.model.steps, quiet)
    planned = make_plans(model_cache(stage.model, stage.cache), layout, {stage.model.steps: table}, None)
    chosen = next(p for p in planned.plans if p.name == str(stage.model.steps))
    scale = family.facts(pipe, size)["timestep_scale"]
    return StageSubject(family, pipe, size, denoiser, layout, planned, chosen, scale)


def quantize_float8(model: Any) -> None:
    """As flux-fast has it: every Linear of the transformer, by torchao."""
    from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False))
    unwrap_tensor_subclass_parameters(model)  # for torch.export


# --- ways to run it ---------------------------------------------------------------------------------------------------


def eager_stage_variants(stage: Stage, subject: StageSubject) -> Variants:
    """The modules as diffusers runs them; with a cache the captured graphs, operator by operator: in the modules, what a
    variant skips would still run."""
    from prebake.exporter.calibrators.eager_replay import eager_variants

    if stage.cache != "off":
        return {v.name: bind_variant(*capture_variant(subject, v)) for v in subject.planned.variants}
    (full,) = subject.planned.variants
    counted, _ = capture_variant(subject, full)
    return {n: replace(v, graph=counted.graph) for n, v in eager_variants(subject.denoiser, subject.planned).items()}


def compiled_stage_variants(stage: Stage, subject: StageSubject) -> Variants:
    """The captured graphs under torch.compile: `max-autotune`, which records CUDA graphs too, and flux-fast's own flags."""
    from torch._inductor import list_mode_options

    settings = {**list_mode_options("max-autotune"), **(FLUX_FAST_FLAGS if stage.way == "flux-fast" else {})}

    def run(graph: Any) -> Any:
        module = torch.compile(graph.gm, options=settings, fullgraph=True)

        def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            # a recorded graph's outputs are overwritten by its next replay, and some outlive a step
            return [t.clone() for t in module(*tensors)]

        return call

    made = {v.name: capture_variant(subject, v) for v in subject.planned.variants}
    return {name: bind_variant(variant, graph, run(graph)) for name, (variant, graph) in made.items()}


def capture_variant(subject: StageSubject, variant: Any) -> tuple[Any, Any]:
    """A variant as `replay` describes it, its FLOPs counted, and its graph."""
    from prebake.exporter.calibrators.eager_replay import eager_variant
    from prebake.exporter.capture.capture import capture_graph
    from prebake.exporter.cost.count import count_cost
    from prebake.exporter.sites.actions import VariantModule

    module = VariantModule(subject.denoiser.module, subject.planned.marks, variant, subject.denoiser.inputs)
    examples = tuple(t.to(subject.denoiser.args[0].device) for t in module.examples(subject.denoiser.args))
    graph = capture_graph(variant.name, module, examples, module.inputs, module.outputs)
    described = eager_variant(subject.denoiser, subject.planned, variant)
    return replace(described, graph=described.graph.model_copy(update={"cost": count_cost(graph)})), graph


def bind_variant(variant: Any, graph: Any, run: Any = None) -> Any:
    """The variant, run by `run`, which takes and gives the graph's flat tensors; None = operator by operator."""
    names, outputs, run = [s.name for s in graph.inputs], [s.name for s in graph.outputs], run or graph.gm
    return replace(variant, call=lambda named: dict(zip(outputs, run(*(named[n] for n in names)), strict=True)))


def measure_artifact_stage(stage: Stage, place: StagePlace, rate: float) -> dict[str, Any]:
    """An artifact of the denoiser alone, exported if it is not there, then opened and timed; and opened in a new process."""
    from prebake.runtime.gpu.graph_loop import RecordedLoop, record_cuda_graph

    begun = time.perf_counter()
    subject, folder, built = export_stage(stage, place)
    made: dict[str, Any] = {"export_s": time.perf_counter() - begun if built else None}
    made["artifact_bytes"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    begun = time.perf_counter()
    artifact = open_stage_artifact(folder, place)
    synchronize(place.device)
    made["load_s"] = time.perf_counter() - begun
    loop = RecordedLoop(record_cuda_graph) if place.device.type == "cuda" else None
    made |= time_variants(subject, artifact.variants, place, rate, loop)
    made |= time_cold_start(folder, place)
    shutil.rmtree(folder)  # its code is kept in the cache, and weights of all stages would fill a disk
    return made


def time_cold_start(folder: Path, place: StagePlace) -> dict[str, Any]:
    """Seconds of a new process until it has its first evaluation, or the last line of what it said instead."""
    begun = time.perf_counter()
    command = [
        sys.executable,
        str(Path(__file__).with_name("gpu.py")),
        "--open",
        str(folder),
        "--work",
        str(place.work),
        *(["--smoke"] if place.device.type == "cpu" else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"no_cold_start": next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")}
    return {"cold_start_s": time.perf_counter() - begun}


def make_room(place: StagePlace, folder: Path, needed: int) -> None:
    """Removes artifacts that other stages left as they were ended. Raises OSError where there is no room for this one."""
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    if (free := shutil.disk_usage(place.work).free) < needed:
        raise OSError(
            f"{place.work}: an artifact of {needed / 2**30:.0f} GiB does not fit on its disk, {free / 2**30:.0f} are free"
        )


def evaluate_once(folder: Path, place: StagePlace) -> None:
    """What a new process does to have its first evaluation."""
    artifact = open_stage_artifact(folder, place)
    full = artifact.variants["full"]
    dtypes = {s.name: getattr(torch, s.dtype) for s in full.graph.inputs}
    full.call({s.name: torch.zeros(s.shape, dtype=dtypes[s.name], device=place.device) for s in full.graph.inputs})
    synchronize(place.device)


def open_stage_artifact(folder: Path, place: StagePlace) -> Any:
    from prebake.runtime.artifact import open_artifact

    return open_artifact(folder, cache_dir=place.work / "opened")


def export_stage(stage: Stage, place: StagePlace) -> tuple[StageSubject, Path, bool]:
    """The artifact, and whether it was made now; code that an earlier run has compiled is taken from its cache."""
    from prebake.exporter import pipeline as exporter
    from prebake.exporter.capture.variants import capture_variants
    from prebake.exporter.cost.count import count_costs
    from prebake.exporter.export_cache.store import Store
    from prebake.exporter.lower import load_backend
    from prebake.exporter.package import folder as package
    from prebake.exporter.prepared_export import PreparedExport
    from prebake.exporter.progress import open_progress
    from prebake.exporter.recipe.resolve import resolve
    from prebake.exporter.rewrite import rewrite_pipeline
    from prebake.exporter.whole_pipeline import WholePipeline
    from prebake.runtime.manifest import Defaults, Source

    recipe = resolve(
        stage.model.recipe,
        (
            f"compile.device={place.device.type}",
            f"quantize.method={WAY_QUANTIZE_METHODS[stage.way]}",
            "cache.method=none",
            f"sampler.steps=[{stage.model.steps}]",
            f"compile.inductor.max_autotune={str(place.device.type == 'cuda').lower()}",
        ),
        f"tiny:{stage.model.tiny}",
    )
    backend, layers = load_backend(recipe.compile.backend), {}
    subject = prepare_subject(
        stage, place, on_device=False, rewrite=lambda pipe: layers.update(rewrite_pipeline(pipe, recipe, backend))
    )
    folder = place.work / "artifacts" / stage.name.replace("/", "-")
    if (folder / "manifest.json").exists():
        return subject, folder, False
    make_room(place, folder, sum(p.nbytes for p in subject.denoiser.module.parameters()))
    with open_progress("quiet") as quiet, package.stage_folder(folder, force=True) as partial:
        planned, graphs = capture_variants(subject.denoiser, subject.planned, quiet)
        defaults = Defaults(
            num_inference_steps=stage.model.steps,
            guidance_scale=0.0,
            height=subject.size.height,
            width=subject.size.width,
        )
        censuses, costs = count_costs({"denoiser": graphs})
        whole = PreparedExport(
            recipe=recipe,
            backend=backend,
            part=WholePipeline(
                family=subject.family, pipe=subject.pipe, size=subject.size, defaults=defaults, tables={}, tails={}
            ),
            source=Source(model=stage.model.name, pipeline=type(subject.pipe).__name__, sha256="random weights"),
            layers=layers,
            calibration=None,
            layout=subject.layout,
            planned=planned,
            graphs={"denoiser": graphs},
            costs=costs,
            censuses=censuses,
        )
        whole, paths = exporter.lower(partial, whole, quiet, Store(place.work / "compiled"))
        exporter.write_folder(partial, whole, paths, quiet)
    return subject, folder, True
