"""One stage of `gpu.py`: a model, a way of running it and a cache come in, figures go out.

Every way runs the same plan: eager modules, the same captured graphs under torch.compile, or the artifact that prebake
exports. A way's variants are called by `runtime/replay.py`'s loop, so that what a picture takes is what it takes there.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import Model, cache_of, pipeline, size_of

FLUX_FAST = {
    "conv_1x1_as_mm": True,
    "epilogue_fusion": False,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
}
"""Inductor's flags of huggingface/flux-fast, utils/pipeline_utils.py."""
QUANTIZE = {"prebake-bf16": "none", "prebake-int8": "int8_dynamic", "prebake-fp8": "fp8_dynamic"}
FP8_FROM = (8, 9)
LONGEST_S = 60
"""Whole pictures that would take longer in all are not drawn."""
Variants = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """`way` is eager, compile, flux-fast, or a key of QUANTIZE."""

    model: Model
    way: str
    cache: str

    @property
    def name(self) -> str:
        return f"{self.model.name}/{self.way}/{self.cache}"


@dataclass(frozen=True)
class Place:
    """Where a stage runs, how often it is timed, and where compiled code and artifacts are kept."""

    device: torch.device
    work: Path
    repeats: int


@dataclass(frozen=True)
class Subject:
    """The model as every way has it: the plan for its steps, and what a replay starts from."""

    family: Any
    pipe: Any
    size: Any
    denoiser: Any
    layout: Any
    planned: Any
    plan: Any
    scale: float


def lacking(stage: Stage, cuda: bool, compile_on_cpu: bool = False) -> str | None:
    """Why the stage cannot run here, or None."""
    modules = ["diffusers", "transformers", "tokenizers", "pydantic", "safetensors"]
    if stage.way == "flux-fast":
        modules.append("torchao")
    if missing := [m for m in modules if importlib.util.find_spec(m) is None]:
        return f"{', '.join(missing)} not installed"
    if stage.way != "eager" and not cuda:
        return None if compile_on_cpu and stage.way == "prebake-bf16" else "no CUDA device that this torch can use"
    if stage.way in ("flux-fast", "prebake-fp8") and torch.cuda.get_device_capability() < FP8_FROM:
        return "fp8 needs compute capability 8.9, this GPU has {}.{}".format(*torch.cuda.get_device_capability())
    return None


def figures(stage: Stage, place: Place) -> dict[str, Any]:
    """Times in milliseconds and seconds, bytes and FLOPs of one stage; the machine's matmul rate is measured first."""
    torch.set_grad_enabled(False)
    rate = matmul_rate(place.device)
    made: dict[str, Any] = {"matmul_flops_per_s": rate}
    if stage.way.startswith("prebake"):
        return made | artifact_figures(stage, place, rate)
    begun = time.perf_counter()
    subject = prepared(stage, place, on_device=True, fused=stage.way == "flux-fast")
    variants = eager(stage, subject) if stage.way == "eager" else compiled(stage, subject)
    made["prepare_s"] = time.perf_counter() - begun
    return made | timed(subject, variants, place, rate)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a product of two large matrices in bfloat16, the best of three rounds."""
    n = 8192 if device.type == "cuda" else 256
    a, b, c = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(3))
    rounds = []
    for _ in range(4):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b, out=c)
        synchronize(device)
        rounds.append(10 * 2 * n**3 / (time.perf_counter() - begun))
    return max(rounds[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the model ------------------------------------------------------------------------------------------------------


def prepared(stage: Stage, place: Place, *, on_device: bool, fused: bool = False, rewrite: Any = None) -> Subject:
    """The denoiser and its plan. Graphs for an artifact are captured on the CPU, where an export captures them."""
    from prebake.exporter import pipeline as exporter
    from prebake.exporter.discover import discover
    from prebake.exporter.plan import plan
    from prebake.exporter.progress import progress

    pipe = pipeline(stage.model, place.device, torch.bfloat16)
    model = getattr(pipe, "unet", None) or pipe.transformer
    if fused:
        model.fuse_qkv_projections()
        quantize_float8(model)
    if rewrite:
        rewrite(pipe)  # where the model is: quantizing 12 billion weights on a CPU takes minutes
    if not on_device:
        model.cpu()
    family = exporter.family_of(pipe)
    size = size_of(stage.model, family, pipe)
    denoiser = family.denoiser(pipe, size)
    if on_device:
        there = tuple(a.to(place.device) for a in denoiser.args)
        denoiser = replace(denoiser, module=denoiser.module.to(place.device), args=there)
    layout = discover(denoiser)
    with progress("quiet") as quiet:
        table = exporter.sampler_table(family, pipe, size, stage.model.steps, quiet)
    planned = plan(cache_of(stage.model, stage.cache), layout, {stage.model.steps: table}, None)
    chosen = next(p for p in planned.plans if p.name == str(stage.model.steps))
    scale = family.facts(pipe, size)["timestep_scale"]
    return Subject(family, pipe, size, denoiser, layout, planned, chosen, scale)


def quantize_float8(model: Any) -> None:
    """As flux-fast has it: every Linear of the transformer, by torchao."""
    from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False))
    unwrap_tensor_subclass_parameters(model)  # for torch.export


# --- ways to run it ---------------------------------------------------------------------------------------------------


def eager(stage: Stage, subject: Subject) -> Variants:
    """The modules as diffusers runs them; with a cache the captured graphs, operator by operator: in the modules, what a
    variant skips would still run."""
    from prebake.exporter.eager import eager_variants

    if stage.cache != "off":
        return {v.name: bound(*captured(subject, v)) for v in subject.planned.variants}
    (full,) = subject.planned.variants
    counted, _ = captured(subject, full)
    return {n: replace(v, graph=counted.graph) for n, v in eager_variants(subject.denoiser, subject.planned).items()}


def compiled(stage: Stage, subject: Subject) -> Variants:
    """The captured graphs under torch.compile: `max-autotune`, which records CUDA graphs too, and flux-fast's own flags."""
    from torch._inductor import list_mode_options

    settings = {**list_mode_options("max-autotune"), **(FLUX_FAST if stage.way == "flux-fast" else {})}

    def run(graph: Any) -> Any:
        module = torch.compile(graph.gm, options=settings, fullgraph=True)

        def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            # a recorded graph's outputs are overwritten by its next replay, and some outlive a step
            return [t.clone() for t in module(*tensors)]

        return call

    made = {v.name: captured(subject, v) for v in subject.planned.variants}
    return {name: bound(variant, graph, run(graph)) for name, (variant, graph) in made.items()}


def captured(subject: Subject, variant: Any) -> tuple[Any, Any]:
    """A variant as `replay` describes it, its FLOPs counted, and its graph."""
    from prebake.exporter.capture import capture
    from prebake.exporter.cost import cost
    from prebake.exporter.eager import eager_variant
    from prebake.exporter.sites import VariantModule

    module = VariantModule(subject.denoiser.module, subject.planned.marks, variant, subject.denoiser.inputs)
    examples = tuple(t.to(subject.denoiser.args[0].device) for t in module.examples(subject.denoiser.args))
    graph = capture(variant.name, module, examples, module.inputs, module.outputs)
    described = eager_variant(subject.denoiser, subject.planned, variant)
    return replace(described, graph=described.graph.model_copy(update={"cost": cost(graph)})), graph


def bound(variant: Any, graph: Any, run: Any = None) -> Any:
    """The variant, run by `run`, which takes and gives the graph's flat tensors; None = operator by operator."""
    names, outputs, run = [s.name for s in graph.inputs], [s.name for s in graph.outputs], run or graph.gm
    return replace(variant, call=lambda named: dict(zip(outputs, run(*(named[n] for n in names)), strict=True)))


def artifact_figures(stage: Stage, place: Place, rate: float) -> dict[str, Any]:
    """An artifact of the denoiser alone, exported if it is not there, then opened and timed; and opened in a new process."""
    begun = time.perf_counter()
    subject, folder, built = exported(stage, place)
    made: dict[str, Any] = {"export_s": time.perf_counter() - begun if built else None}
    made["artifact_bytes"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    begun = time.perf_counter()
    artifact = opened(folder, place)
    synchronize(place.device)
    made["load_s"] = time.perf_counter() - begun
    made |= timed(subject, artifact.variants, place, rate)
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
    subprocess.run(command, check=True, capture_output=True, text=True)
    return made | {"cold_start_s": time.perf_counter() - begun}


def evaluate_once(folder: Path, place: Place) -> None:
    """What a new process does to have its first evaluation."""
    artifact = opened(folder, place)
    full = artifact.variants["full"]
    dtypes = {s.name: getattr(torch, s.dtype) for s in full.graph.inputs}
    full.call({s.name: torch.zeros(s.shape, dtype=dtypes[s.name], device=place.device) for s in full.graph.inputs})
    synchronize(place.device)


def opened(folder: Path, place: Place) -> Any:
    from prebake.runtime.artifact import open_artifact

    return open_artifact(folder, cache_dir=place.work / "opened")


def exported(stage: Stage, place: Place) -> tuple[Subject, Path, bool]:
    """The artifact, and whether it was made now; code that an earlier run has compiled is taken from its cache."""
    from prebake.exporter import package
    from prebake.exporter import pipeline as exporter
    from prebake.exporter.cost import cost
    from prebake.exporter.pipeline import Prepared, capture_variants
    from prebake.exporter.progress import progress
    from prebake.exporter.recipe import resolve
    from prebake.exporter.rewrite import rewrite
    from prebake.exporter.store import Store
    from prebake.runtime.manifest import Defaults, Source

    recipe = resolve(
        stage.model.recipe,
        (
            f"compile.device={place.device.type}",
            f"quantize.method={QUANTIZE[stage.way]}",
            "cache.method=none",
            f"sampler.steps=[{stage.model.steps}]",
            f"compile.inductor.max_autotune={str(place.device.type == 'cuda').lower()}",
        ),
        f"tiny:{stage.model.tiny}",
    )
    layers: dict[str, Any] = {}
    subject = prepared(stage, place, on_device=False, rewrite=lambda pipe: layers.update(rewrite(pipe, recipe)))
    folder = place.work / "artifacts" / stage.name.replace("/", "-")
    if (folder / "manifest.json").exists():
        return subject, folder, False
    with progress("quiet") as quiet, package.staged(folder, force=True) as partial:
        planned, graphs = capture_variants(subject.denoiser, subject.planned, quiet)
        defaults = Defaults(
            num_inference_steps=stage.model.steps,
            guidance_scale=0.0,
            height=subject.size.height,
            width=subject.size.width,
        )
        whole = Prepared(
            recipe=recipe,
            family=subject.family,
            pipe=subject.pipe,
            size=subject.size,
            source=Source(model=stage.model.name, pipeline=type(subject.pipe).__name__, sha256="random weights"),
            defaults=defaults,
            layers=layers,
            calibration=None,
            layout=subject.layout,
            planned=planned,
            graphs={"denoiser": graphs},
            costs={g.name: cost(g) for g in graphs},
        )
        whole, paths = exporter.lower(partial, whole, quiet, Store(place.work / "compiled"))
        exporter.write(partial, whole, paths, quiet)
    return subject, folder, True


# --- times -----------------------------------------------------------------------------------------------------------


def timed(subject: Subject, variants: Variants, place: Place, rate: float) -> dict[str, Any]:
    """Per variant the median of one evaluation, FLOPs, their share of `rate`; launches; and whole pictures, or where those
    would take too long the sum of their evaluations."""
    plan, used = subject.plan, {e.variant for e in subject.plan.evaluations}
    variants = {name: v for name, v in variants.items() if name in used}
    counted = {name: v.graph.cost.flops for name, v in variants.items()}
    begin = plan.model_copy(
        update={"evaluations": plan.evaluations[: beginning([e.variant for e in plan.evaluations])]}
    )
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    first = replayed(subject, begin, variants, place)
    spans: dict[str, list[float]] = {}
    watched = {n: watching(v, place.device, spans.setdefault(n, [])) for n, v in variants.items()}
    for _ in range(place.repeats):
        replayed(subject, begin, watched, place)
    ms = {name: statistics.median(each) for name, each in spans.items()}
    estimate = sum(ms[e.variant] for e in plan.evaluations) / 1e3
    whole = estimate * place.repeats < LONGEST_S
    pictures = [replayed(subject, plan, variants, place) for _ in range(place.repeats)] if whole else [estimate]
    on_gpu = place.device.type == "cuda"
    return {
        "first_evaluations_s": first,
        "picture_s": statistics.median(pictures),
        "picture_is": "measured" if whole else "the sum of its evaluations",
        "evaluations": len(plan.evaluations),
        "flops_of_uncached": statistics.fmean(counted[e.variant] for e in plan.evaluations) / counted["full"],
        "variants": {
            name: {
                "ms": ms[name],
                "spread_ms": max(spans[name]) - min(spans[name]),
                "flops": counted[name],
                "of_matmul_rate": counted[name] / (ms[name] / 1e3) / rate,
            }
            for name in variants
        },
        "launches_per_step": launches(lambda: replayed(subject, begin, variants, place)) / len(begin.evaluations)
        if on_gpu
        else None,
        "device_memory_bytes": torch.cuda.max_memory_allocated(place.device) if on_gpu else None,
    }


def beginning(names: Sequence[str]) -> int:
    """How many evaluations from the first until each variant has run twice, or as often as it does at all."""
    for n in range(1, len(names)):
        if all(names[:n].count(name) >= min(2, names.count(name)) for name in set(names)):
            return n
    return len(names)


def replayed(subject: Subject, plan: Any, variants: Variants, place: Place) -> float:
    """Seconds of the runtime's loop over the plan."""
    from prebake.exporter.eager import sites_of
    from prebake.runtime.replay import replay, tables_on

    named = {n: a.to(place.device) for n, a in zip(subject.denoiser.inputs, subject.denoiser.args, strict=True)}
    inputs = {n: t for n, t in named.items() if n not in ("hidden_states", "timestep")}
    latents = named["hidden_states"].float() * plan.init_noise_sigma
    draws = [torch.randn_like(latents) for e in plan.evaluations if e.update.noise]
    tables, sites = tables_on(plan, place.device, subject.scale), sites_of(subject.planned)
    synchronize(place.device)
    begun = time.perf_counter()
    replay(tables, variants, sites, inputs, latents, noise=draws)
    synchronize(place.device)
    return time.perf_counter() - begun


def watching(variant: Any, device: torch.device, spans: list[float]) -> Any:
    """The variant, whose milliseconds are added to `spans` at each call."""

    def call(given: Mapping[str, Any]) -> Any:
        synchronize(device)
        begun = time.perf_counter()
        result = variant.call(given)
        synchronize(device)
        spans.append((time.perf_counter() - begun) * 1e3)
        return result

    return replace(variant, call=call)


def launches(run: Callable[[], Any]) -> int:
    """Kernels and recorded graphs that it launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
    return sum(e.count for e in profiled.key_averages() if e.key.startswith(names))
