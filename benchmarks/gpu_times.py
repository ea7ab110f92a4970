"""How long a plan takes, evaluation by evaluation and as a whole, and what a machine's matrix products could do at best.

Variants by name come in, whatever runs them; the runtime's own loop calls them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

MAX_PICTURES_S = 60
"""Whole pictures that would take longer in all are not drawn."""
Variants = Mapping[str, Any]


@dataclass(frozen=True)
class StagePlace:
    """Where a stage runs, how often it is timed, and where compiled code and artifacts are kept."""

    device: torch.device
    work: Path
    repeats: int


@dataclass(frozen=True)
class StageSubject:
    """The model as every way has it: the plan for its steps, and what a replay starts from."""

    family: Any
    pipe: Any
    size: Any
    denoiser: Any
    layout: Any
    planned: Any
    plan: Any
    scale: float


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


def time_variants(
    subject: StageSubject, variants: Variants, place: StagePlace, rate: float, loop: Any = None
) -> dict[str, Any]:
    """Per variant the median of one evaluation, FLOPs, their share of `rate`; launches; and whole pictures, or where those
    would take too long the sum of their evaluations. Pictures go through `loop`, too, which may be a recorded one."""
    plan, used = subject.plan, {e.variant for e in subject.plan.evaluations}
    variants = {name: v for name, v in variants.items() if name in used}
    counted = {name: v.graph.cost.flops for name, v in variants.items()}
    begin = plan.model_copy(
        update={"evaluations": plan.evaluations[: warm_prefix_length([e.variant for e in plan.evaluations])]}
    )
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    first = time_replay(subject, begin, variants, place)
    spans: dict[str, list[float]] = {}
    watched = {n: time_variant_calls(v, place.device, spans.setdefault(n, [])) for n, v in variants.items()}
    for _ in range(place.repeats):
        time_replay(subject, begin, watched, place)
    ms = {name: statistics.median(each) for name, each in spans.items()}
    estimate = sum(ms[e.variant] for e in plan.evaluations) / 1e3
    whole = estimate * place.repeats < MAX_PICTURES_S
    pictures = [time_replay(subject, plan, variants, place) for _ in range(place.repeats)] if whole else [estimate]
    on_gpu = place.device.type == "cuda"
    stepwise = statistics.median(pictures)
    memory = torch.cuda.max_memory_allocated(place.device) if on_gpu else None
    counted_launches = (
        count_launches(lambda: time_replay(subject, begin, variants, place), len(begin.evaluations)) if on_gpu else {}
    )
    # last, for a recording that fails may leave the device unusable
    recorded = time_loop(subject, variants, place, loop) if loop and whole else {}
    return {
        "first_evaluations_s": first,
        "picture_s": recorded.get("recorded_picture_s", stepwise),
        "stepwise_picture_s": stepwise,
        **recorded,
        **counted_launches,
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
        "device_memory_bytes": memory,
    }


def warm_prefix_length(names: Sequence[str]) -> int:
    """How many evaluations from the first until each variant has run twice, or as often as it does at all."""
    for n in range(1, len(names)):
        if all(names[:n].count(name) >= min(2, names.count(name)) for name in set(names)):
            return n
    return len(names)


def time_loop(subject: StageSubject, variants: Variants, place: StagePlace, loop: Any) -> dict[str, Any]:
    """The median of whole pictures through the loop, behind two calls in which it warms up and records; or why it does not."""
    try:
        spans = [time_replay(subject, subject.plan, variants, place, loop) for _ in range(2 + place.repeats)]
    except Exception as e:
        return {"not_recorded": first_line(e)}
    return {"recorded_picture_s": statistics.median(spans[2:])}


def first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def time_replay(subject: StageSubject, plan: Any, variants: Variants, place: StagePlace, loop: Any = None) -> float:
    """Seconds of the runtime's loop over the plan, or of another with its signature."""
    from prebake.exporter.calibrators.eager_replay import describe_sites
    from prebake.runtime.replay import replay, tabulate_plan

    named = {n: a.to(place.device) for n, a in zip(subject.denoiser.inputs, subject.denoiser.args, strict=True)}
    inputs = {n: t for n, t in named.items() if n not in ("hidden_states", "timestep")}
    latents = named["hidden_states"].float() * plan.init_noise_sigma
    draws = [torch.randn_like(latents) for e in plan.evaluations if e.update.noise]
    tables, sites = tabulate_plan(plan, place.device, subject.scale), describe_sites(subject.planned)
    synchronize(place.device)
    begun = time.perf_counter()
    (loop or replay)(tables, variants, sites, inputs, latents, noise=draws)
    synchronize(place.device)
    return time.perf_counter() - begun


def time_variant_calls(variant: Any, device: torch.device, spans: list[float]) -> Any:
    """The variant, whose milliseconds are added to `spans` at each call."""

    def call(given: Mapping[str, Any]) -> Any:
        synchronize(device)
        begun = time.perf_counter()
        result = variant.call(given)
        synchronize(device)
        spans.append((time.perf_counter() - begun) * 1e3)
        return result

    return replace(variant, call=call)


def count_launches(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Kernels and recorded graphs that it launches in each of so many steps; or why they could not be counted: there are
    machines whose GPU is not to be profiled."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            run()
    except Exception as e:
        return {"not_profiled": first_line(e)}
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
    count = sum(e.count for e in profiled.key_averages() if e.key.startswith(names))
    return {"launches_per_step": count / steps} if count else {"not_profiled": "the profiler saw no launch"}
