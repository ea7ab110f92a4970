"""Forecast: what an export would give, before anything is compiled, as plain values for `--dry-run` and `prebake plan`.

Graphs with their FLOPs, bytes and predicted times on this machine; plans with their steps, their share of the cost of the
same evaluations all computed, and the speed-up that this should give.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from ...runtime.check.machine import cpu_flags, cpu_name
from ...runtime.plan import Plan
from ...runtime.text import VARIANT_SIGNS, align_columns, block_signs, format_bytes, format_count, step_strip

if TYPE_CHECKING:
    from ...runtime.rates.rates_file import Machine
    from ..lower import Backend
    from ..prepared_export import PreparedExport
    from ..progress import Progress
    from ..recipe.resolve import Compile
    from .machine_rates import GraphForecast, MachineRates


def forecast_graphs(prepared: PreparedExport, progress: Progress) -> dict[str, GraphForecast]:
    """Graph -> its predicted time, by this machine's rates: where they are not known yet they are measured, which `progress`
    is told."""
    rates = build_rates(prepared.recipe.compile, prepared.backend, progress)
    return {
        name: rates.forecast(census, prepared.costs[name].constants_bytes) for name, census in prepared.censuses.items()
    }


def build_rates(config: Compile, backend: Backend, progress: Progress | None = None) -> MachineRates:
    """This machine's rates, for code that is compiled so."""
    from .machine_rates import MachineRates

    stand_in = getattr(backend, "stand_in", None)
    return MachineRates(describe_machine(config, backend), lambda: stand_in(config) if stand_in else None, progress)


def describe_machine(config: Compile, backend: Backend) -> Machine:
    """What rates depend on, of this machine, torch and the backend."""
    import torch

    from ...runtime.rates.rates_file import Machine

    flags = hashlib.sha256(" ".join(sorted(cpu_flags())).encode()).hexdigest()[:12]
    kernels = getattr(backend, "kernel_version", None)
    return Machine(
        cpu=cpu_name(),
        flags=flags,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        kernels=kernels(config) if kernels else "",
        backend=config.backend,
        isa=config.isa,
    )


def describe_forecast(prepared: PreparedExport, predicted: Mapping[str, GraphForecast]) -> dict[str, Any]:
    """`share` is of the variant that computes everything, in time; `flops_share` and `time_share` of a plan are of the
    same evaluations all computed; `speedup` is the denoiser's, `image_speedup` counts encoders and decoder too."""
    variants = [v.name for v in prepared.planned.variants]
    full = variants[0]
    ms = {name: forecast.ms for name, forecast in predicted.items()}
    flops_shares = {name: prepared.costs[name].flops / prepared.costs[full].flops for name in variants}
    shares = {name: ms[name] / ms[full] for name in variants}
    once = sum(ms[name] for name in ms if name not in variants)
    graphs = {
        name: {
            **cost.model_dump(),
            "predicted_ms": ms[name],
            "predicted_ms_by_class": {**predicted[name].heavy_ms, "loops": predicted[name].loops_ms},
            **({"share": shares[name]} if name in shares else {}),
        }
        for name, cost in prepared.costs.items()
    }
    plans = {}
    for p in prepared.planned.plans:
        figures = plan_figures(p, assign_signs(variants), flops_shares)
        loop, whole = sum(ms[e.variant] for e in p.evaluations), len(p.evaluations) * ms[full]
        plans[p.name] = {
            **figures,
            "time_share": loop / whole,
            "speedup": whole / loop,
            "image_speedup": (whole + once) / (loop + once),
            "image_ms": loop + once,
        }
    return {"graphs": graphs, "plans": plans, "variants": assign_signs(variants)}


def plan_figures(plan: Plan, letters: Mapping[str, str], flops_shares: Mapping[str, float]) -> dict[str, Any]:
    """The plan's calls and strip, and its share of the FLOPs of the same evaluations all computed."""
    from .count import plan_share

    return {
        "cache": plan.cache,
        "scheduler": plan.scheduler,
        "evaluations": len(plan.evaluations),
        "calls": dict(Counter(e.variant for e in plan.evaluations)),
        "flops_share": plan_share(plan, flops_shares),
        "strip": step_strip(plan, letters),
    }


def assign_signs(variants: Iterable[str]) -> dict[str, str]:
    """Variant -> its sign in a strip; the first computes everything, and those beyond the alphabet are all `?`."""
    return dict(zip(variants, chain(VARIANT_SIGNS, repeat("?")), strict=False))


def format_forecast(described: Mapping[str, Any], encoding: str | None) -> Iterator[str]:
    """The forecast as lines of text."""
    if graphs := described.get("graphs"):
        yield from align_columns(list(graph_rows(graphs)), right=range(1, 7))
        yield ""
    blocks = block_signs(described["variants"], encoding)
    redrawn = {letter: blocks[name] for name, letter in described["variants"].items()}
    yield from align_columns(list(plan_rows(described["plans"], redrawn)), right=range(1, 5))
    yield ", ".join(f"{sign} = {name}" for name, sign in blocks.items())


def graph_rows(graphs: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "graph", "FLOPs", "moved", "ops", "weights", "ms", "share"
    for name, g in graphs.items():
        share = f"{g['share']:.1%}" if "share" in g else ""
        moved, weights = format_bytes(g["moved_bytes"]), format_bytes(g["constants_bytes"])
        ms = g["predicted_ms"]
        yield (
            name,
            format_count(g["flops"]),
            moved,
            str(g["ops"]),
            weights,
            f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}",
            share,
        )


def plan_rows(plans: Mapping[str, Any], redrawn: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """Times are left out where none were predicted: for an artifact that exists."""
    timed = all("time_share" in p for p in plans.values())
    yield ("plan", "FLOPs", *(("time", "speed-up", "of an image") if timed else ()), "evaluations", "")
    for name, p in plans.items():
        times = (f"{p['time_share']:.1%}", f"{p['speedup']:.2f}x", f"{p['image_speedup']:.2f}x") if timed else ()
        calls = ", ".join(f"{n} {variant}" for variant, n in p["calls"].items())
        yield (name, f"{p['flops_share']:.1%}", *times, calls, "".join(redrawn[sign] for sign in p["strip"]))
