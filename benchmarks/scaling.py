"""How an evaluation of FLUX grows on a CPU: with tokens, with blocks, with prompts, with threads.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json --plot docs/images/scaling.png
    python benchmarks/scaling.py --quick                                    # two small points of each curve
    python benchmarks/scaling.py --draw benchmarks/results/scaling.json --plot docs/images/scaling.png

Random weights, 16 heads of 64 features, one double block to two single ones. diffusers in float32 and in bfloat16 and what
prebake makes of it by the recipe `flux-fast` (int8, the rest bfloat16, no cache) take turns, after a round that is not counted.
Seconds are the CPU's, of one thread, so that other programs may run meanwhile; on the curve of threads they are the clock's, and
nothing else may run. Memory is that of the weights and the most that an evaluation adds to it; what libraries take is not in it.
Export is all that an export does with one graph: quantizing, capturing, compiling, packing; CPU seconds, the compiler's too.
An artifact's graphs are for one prompt, so that of several each is an evaluation; diffusers takes them as one batch.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cpu
import figures
import scaling_figures
import torch
from torch import Tensor, nn

TimedRun = Callable[[], Any]
BASE_POINT = {"tokens": 1024, "blocks": 3, "prompts": 1, "threads": 1}
CURVES: Mapping[str, Sequence[int]] = {
    "tokens": (256, 512, 1024, 2048, 4096, 8192),
    "blocks": (3, 6, 12),
    "prompts": (1, 2, 4, 8),
    "threads": (1, 2),
}
QUICK_BASE_POINT = {**BASE_POINT, "tokens": 64}
QUICK_CURVES: Mapping[str, Sequence[int]] = {
    "tokens": (64, 128),
    "blocks": (3, 6),
    "prompts": (1, 2),
    "threads": (1, 2),
}
SECONDS_A_WAY = 12.0
"""Rounds end early, but not before the third, where evaluations take long."""


class CompiledFlux(NamedTuple):
    """A FLUX in three ways: diffusers' two problems, and what prebake compiled, with its weights and what the export took."""

    float32: cpu.DenoiserProblem
    bfloat16: cpu.DenoiserProblem
    compiled: Callable[[], Tensor]
    compiled_bytes: int
    export_s: float


@lru_cache(maxsize=1)  # the curves of prompts and threads have one model
def build_compiled_flux(tokens: int, blocks: int, threads: int) -> CompiledFlux:
    """Text has what the picture, which is square, leaves of the tokens: at least 16."""
    side = math.isqrt(tokens - 16)
    problem = cpu.flux_problem(blocks // 3, blocks - blocks // 3, side, tokens - side**2)
    half = problem.to(cpu.HALF_DTYPE)
    quantized, _ = cpu.quantize_problem(half)
    size = module_bytes(quantized.module)
    del quantized
    began = processor_seconds()
    compiled = cpu.compile_with_aoti(half, threads)
    return CompiledFlux(problem, half, compiled, size, processor_seconds() - began)


def module_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def processor_seconds() -> float:
    """CPU seconds of this process and of those that it started and waited for."""
    return sum(os.times()[:4])


def batch_inputs(problem: cpu.DenoiserProblem, prompts: int) -> TimedRun:
    """diffusers takes all prompts at once."""
    args = tuple(a.repeat(prompts, *[1] * (a.ndim - 1)) for a in problem.args)
    return lambda: problem.module(*args)


def measure_point(curve: str, at: int, base: Mapping[str, int], repeats: int) -> dict[str, Any]:
    """The three ways at one place of a curve."""
    setting = {**base, curve: at}
    threads = setting["threads"]
    torch.set_num_threads(threads)
    made_of = build_compiled_flux(setting["tokens"], setting["blocks"], threads)
    runs: dict[str, TimedRun] = {
        "eager float32": batch_inputs(made_of.float32, setting["prompts"]),
        "eager bfloat16": batch_inputs(made_of.bfloat16, setting["prompts"]),
        "prebake": lambda: [made_of.compiled() for _ in range(setting["prompts"])],
    }
    began = time.perf_counter()
    outputs = {way: run() for way, run in runs.items()}
    rounds = max(3, min(repeats, int(SECONDS_A_WAY * len(runs) / (time.perf_counter() - began))))
    seconds = cpu.time_in_turn(runs, rounds) if curve != "threads" else time_rounds(runs, rounds)
    sizes = (module_bytes(made_of.float32.module), module_bytes(made_of.bfloat16.module), made_of.compiled_bytes)
    ways = {way: {"seconds": seconds[way], "error": output_error(outputs, way)} for way in runs}
    if curve != "threads":
        for (way, run), size in zip(runs.items(), sizes, strict=True):
            ways[way]["bytes"] = size + measure_added_bytes(run)
    exported = {"export_s": made_of.export_s} if curve in ("tokens", "blocks") else {}
    return {"at": at, **setting, **exported, "ways": ways}


def time_rounds(runs: Mapping[str, TimedRun], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, a figure for each round, however many threads share the work."""
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def output_error(outputs: Mapping[str, Any], way: str) -> float:
    """Relative to eager float32, in L2; of the first prompt, for all are the same."""
    first = {name: (o[0] if isinstance(o, list) else o)[:1].float() for name, o in outputs.items()}
    truth = first["eager float32"]
    return float((first[way] - truth).norm() / truth.norm())


def measure_added_bytes(run: TimedRun) -> int:
    """How much more memory is resident at the most while it runs than before. Linux only: the peak is set back by `clear_refs`."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    before = read_resident("VmRSS")
    run()
    return read_resident("VmHWM") - before


def read_resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def measure_curves(curves: Mapping[str, Sequence[int]], base: Mapping[str, int], repeats: int) -> dict[str, Any]:
    build_compiled_flux(
        base["tokens"], base["blocks"], 1
    )  # what compilers and libraries do once is done before any export is timed
    build_compiled_flux.cache_clear()
    found: dict[str, Any] = {}
    for name, places in curves.items():
        found[name] = []
        for at in places:
            found[name].append(measure_point(name, at, base, repeats))
            print(f"  {at} {name}", flush=True)
    return found


WAY_COLORS = {"eager float32": "tab:gray", "eager bfloat16": "tab:blue", "prebake": "tab:red"}


def draw_curves(found: Mapping[str, Any], output: Path) -> None:
    """Time above, memory and export below; both axes logarithmic, and dashed what would be in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 7), dpi=100)
    curves = found["curves"]
    panels = [
        *((axes[0][i], name, "seconds", "seconds an evaluation") for i, name in enumerate(scaling_figures.CURVE_UNITS)),
        *((axes[1][i], name, "bytes", "MiB") for i, name in enumerate(("tokens", "blocks", "prompts"))),
    ]
    for panel, name, quantity, label in panels:
        for way, color in WAY_COLORS.items():
            at, values = scaling_figures.quantity_points(curves[name], quantity, way)
            shown = [v / 2**20 for v in values] if quantity == "bytes" else values
            draw_line(panel, at, shown, color, way if way != "prebake" else "prebake, int8", down=name == "threads")
        decorate_panel(panel, scaling_figures.CURVE_UNITS[name], label, [p["at"] for p in curves[name]])
    for name, marker in (("tokens", "o"), ("blocks", "s")):
        at, values = scaling_figures.quantity_points(curves[name], "export", "prebake")
        draw_line(axes[1][3], [a / at[0] for a in at], values, "tab:red", f"prebake, by {name}", marker=marker)
    widest = max(len(curves[name]) for name in ("tokens", "blocks"))
    decorate_panel(axes[1][3], "times the fewest", "seconds an export, of one graph", [2**i for i in range(widest)])
    figure.tight_layout()
    figure.savefig(output, metadata={"Software": None})
    print(output)


def draw_line(panel: Any, at: Sequence[float], values: Sequence[float], color: str, label: str, *, down: bool = False, marker: str = "o") -> None:  # fmt: skip
    """What was measured, and dashed from its first point on what would be in proportion, or `down` in inverse proportion."""
    panel.plot(at, values, color=color, marker=marker, markersize=4, label=label)
    ideal = [values[0] * (at[0] / a if down else a / at[0]) for a in at]
    panel.plot(at, ideal, color=color, ls="--", lw=0.9, alpha=0.6)


def decorate_panel(panel: Any, unit: str, label: str, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator

    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:,g}")
    panel.minorticks_off()
    panel.set(xlabel=unit, ylabel=label)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="rounds, fewer where they take long")
    parser.add_argument("--quick", action="store_true", help="two small points of each curve")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw them")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw earlier ones, and measure nothing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    if args.draw:
        return draw_curves(json.loads(args.draw.read_text("utf-8")), args.plot or args.draw.with_suffix(".png"))
    curves, base = (QUICK_CURVES, QUICK_BASE_POINT) if args.quick else (CURVES, BASE_POINT)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # where `cpu.py` and compilers leave their files
        torch.manual_seed(0)
        found = {"curves": measure_curves(curves, base, args.repeats)}
    for name in curves:
        print("", scaling_figures.curve_table(found, name), sep="\n")
    print(scaling_figures.powers_table(found), scaling_figures.balance_sentence(found), sep="\n")
    torch.set_num_threads(1)
    figures.save_figures(found, args.output)
    if args.plot:
        draw_curves(found, args.plot)
    return None


if __name__ == "__main__":
    main()
