#!/usr/bin/env python
"""Every cache at several strengths, and the same time spent on fewer steps: wall time of compiled code against pictures.

    python benchmarks/caches.py --model shapes --calibration recipes/flux-fast.calibration.json --output benchmarks/results/caches-shapes.json
    python benchmarks/caches.py --model shapes-sd --calibration benchmarks/results/caches-shapes-sd.calibration.json --output benchmarks/results/caches-shapes-sd.json
    python benchmarks/caches.py --plot benchmarks/results/caches-shapes.json benchmarks/results/caches-shapes-sd.json

Each plan is compiled in float32 for one thread, so that what differs between rows is the cache. Prompt after prompt is
drawn with every plan from the same noise, one plan after the other, so all see the machine in the same state; a time is
the denoising loop's, as a share of the uncached plan's in that run. Pictures are held against the uncached plan's: PSNR on
prompts that leave attributes open and on prompts that name all, structural similarity on all, and the share of prompts
that the checker of `shapes` finds answered exactly. Methods that look at the data are calibrated on other noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figures
import torch

from prebake.exporter import shapes
from prebake.exporter.bench.compiled_variants import VariantCompiler, describe_sites
from prebake.exporter.caches import (
    Auto,
    Cache,
    DBCache,
    DeepCache,
    FasterCache,
    FirstBlockCache,
    Fora,
    MagCache,
    Mask,
    NoCache,
    PyramidAttentionBroadcast,
    SmoothCache,
    TaylorSeer,
    TeaCache,
)
from prebake.exporter.caches.common.calibration import Calibration, read_calibration
from prebake.exporter.calibrators.runner import (
    average_figures,
    build_rule_replay,
    count_decisions,
    draw_runs,
    observe_runs,
)
from prebake.exporter.calibrators.subject import CalibrationRun, CalibrationSubject
from prebake.exporter.families.registry import find_family
from prebake.exporter.load import source
from prebake.exporter.lower import load_backend
from prebake.exporter.plan import make_plans
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import Recipe, resolve
from prebake.exporter.rewrite import rewrite_pipeline
from prebake.exporter.settle import sampler_table, settle
from prebake.exporter.shapes.checker import check_picture
from prebake.exporter.sites.discover import discover_layout
from prebake.exporter.verify.closeness import psnr_db, ssim
from prebake.runtime.errors import ExportError, RecipeError
from prebake.runtime.plan import Plan
from prebake.runtime.replay import DenoiserVariant, PlanTables, replay, tabulate_plan

RECIPES = {"shapes": "flux-fast", "shapes-sd": "sd-fast"}
FLOAT32 = (
    "cache.method=none",
    "quantize.method=none",
    *(f"precision.{part}=float32" for part in ("denoiser", "text_encoders", "vae")),
)
FEWER_STEPS = (21, 16, 14, 12, 10, 8, 7)
BUDGETS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55)
SEED = 10_000  # of the first prompt; calibrations count from 0
WHOLE_RANGE = (-1, 1001)  # a window that holds every timestep


@dataclass(frozen=True)
class Contender:
    """A row: a cache and the number of steps."""

    label: str
    cache: Any
    steps: int


@dataclass
class CacheRow:
    """A contender as it runs, and what was seen of it."""

    contender: Contender
    tables: PlanTables
    variants: dict[str, DenoiserVariant]
    sites: dict[str, Any]
    strip: str
    seconds: list[float] = field(default_factory=list)
    psnr: dict[str, list[float]] = field(default_factory=lambda: {"open": [], "full": []})
    ssim: list[float] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)


def list_contenders(model: str, steps: int) -> Iterator[Contender]:
    """What runs on a model: the FLUX model has transformer blocks, the UNet has branches to reuse."""
    both: list[tuple[str, Any]] = [("uncached", NoCache())]
    for budget in BUDGETS:
        both.append((f"auto {budget:g}", Auto(budget=budget)))
    for mask, order in (("1(01)", 0), ("11(01)", 1), ("1111(001)", 1), ("1111(0001)", 1), ("111(01)", 2)):
        both.append((f"mask {mask} order {order}, output", Mask(mask=mask, order=order, site="output")))
    if model == "shapes":
        both += list(dit_contenders())
    else:
        for interval in (2, 3, 5):
            both.append((f"deepcache {interval}, branch 0", DeepCache(cache_interval=interval)))
        both.append(("deepcache 3 pow, branch 0", DeepCache(cache_interval=3, skip_mode="pow")))
        both.append(("deepcache 2, branch 1", DeepCache(cache_interval=2, cache_branch_id=1)))
        both.append(("pab 2", pab_contenders(2)))
    yield from (Contender(label, cache, steps) for label, cache in both)
    yield from (Contender(f"{n} steps", NoCache(), n) for n in FEWER_STEPS if n < steps)


def pab_contenders(every: int) -> Cache:
    return PyramidAttentionBroadcast(
        spatial_attention_block_skip_range=every, spatial_attention_timestep_skip_range=(0, 1000)
    )


def dit_contenders() -> Iterator[tuple[str, Any]]:
    """The methods that need transformer blocks or joint attention."""
    for mask in ("slow", "medium", "fast", "ultra"):
        yield f"mask {mask}", Mask(mask=mask)
    yield "mask 1111(001) order 1, blocks", Mask(mask="1111(001)", order=1)
    for interval in (2, 3):
        yield f"fora {interval}", Fora(interval=interval)
    for every in (2, 3):
        yield f"pab {every}", pab_contenders(every)
        yield (
            f"fastercache {every}",
            FasterCache(
                spatial_attention_block_skip_range=every,
                spatial_attention_timestep_skip_range=WHOLE_RANGE,
                is_guidance_distilled=True,
            ),
        )
    for interval in (2, 3, 5):
        yield f"taylorseer {interval}", TaylorSeer(cache_interval=interval, taylor_factors_dtype="float32")
    for threshold in (0.05, 0.1, 0.2):
        yield f"smoothcache {threshold:g}", SmoothCache(calibration_threshold=threshold)
    for threshold in (0.06, 0.24):
        yield f"magcache {threshold:g}", MagCache(threshold=threshold)
    for threshold in (0.05, 0.1, 0.2):
        yield f"firstblock {threshold:g}", FirstBlockCache(threshold=threshold)
    for threshold in (0.1, 0.2, 0.4):
        yield f"teacache {threshold:g}", TeaCache(rel_l1_thresh=threshold, coefficients=(1.0, 0.0))
    for threshold in (0.08, 0.2):
        settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": threshold}
        yield f"dbcache F1 {threshold:g}", DBCache(**settings)
        yield f"dbcache F1 {threshold:g} taylorseer", DBCache(**settings, calibrator_type="taylorseer")


class CacheBench:
    """One model, loaded once; plans are compiled as they are asked for."""

    def __init__(self, model: str, steps: int, fitted: Calibration | None) -> None:
        recipe: Recipe = resolve(RECIPES[model], FLOAT32, model)
        self.quiet = open_progress("quiet")
        loaded = source.load_model(model, None, {"default": torch.float32})
        self.pipe, self.family = loaded.pipe, find_family(loaded.pipe)
        rewrite_pipeline(self.pipe, recipe, load_backend(recipe.compile.backend))
        self.defaults, self.size, _ = settle(recipe, self.family, loaded)
        self.steps, self.fit_weights, self.source = steps, fitted, loaded.source
        self.denoiser = self.family.denoiser(self.pipe, self.size)
        self.layout = discover_layout(self.denoiser)
        self.scale = self.family.facts(self.pipe, self.size)["timestep_scale"]
        self.compiled = VariantCompiler()
        decoder = self.family.other_components(self.pipe, self.size, channels_last=False)[-1].module
        self.decode = lambda latents: decoder(latents)[0]

    def table(self, steps: int):
        with open_progress("quiet") as quiet:
            return sampler_table(self.family, self.pipe, self.size, steps, quiet)

    def runs(self, prompts: Sequence[str]) -> list[CalibrationRun]:
        """The prompts with noise that no calibration has seen."""
        guidance = self.defaults.guidance_scale
        return list(draw_runs(self.family, self.pipe, self.size, self.table(self.steps), prompts, 1, guidance, SEED))

    def observe(self, count: int) -> None:
        """What eager runs on noise of their own show, for the methods that are calibrated."""
        prompts = shapes.read_prompt_set("underspecified")
        guidance = self.defaults.guidance_scale
        table = self.table(self.steps)
        every = list(draw_runs(self.family, self.pipe, self.size, table, prompts, 3, guidance))
        self.calibration_runs = every[2::3][:count]
        self.subject = CalibrationSubject(self.denoiser, self.layout, table, self.scale)
        with open_progress("quiet") as quiet:
            observed, _ = observe_runs(self.subject, NoCache(), iter(self.calibration_runs), quiet)
        self.calibration = Calibration(
            model=self.source.model, sha256=self.source.sha256, scheduler=table.scheduler, steps=self.steps,
            timesteps=table.timesteps, guidance_scale=guidance, prompts=count, prompts_sha256="", seeds=1,
            auto=self.fit_weights.auto if self.fit_weights else (), **average_figures(self.layout, observed),
        )  # fmt: skip

    def row(self, contender: Contender) -> CacheRow:
        """The contender's plan, compiled. Raises ExportError or RecipeError where the model or the steps do not suit it."""
        calibration = self.calibration
        if decides := build_rule_replay(contender.cache):
            decided = [decides(self.subject, run).decisions for run in self.calibration_runs]
            frozen = {contender.cache.method: count_decisions(contender.cache, decided)}
            calibration = calibration.model_copy(update={"decisions": frozen})
        planned = make_plans(contender.cache, self.layout, {contender.steps: self.table(contender.steps)}, calibration)
        chosen = planned.plans[0]
        planned, variants = self.compiled.variants(self.denoiser, planned)
        return CacheRow(
            contender,
            tabulate_plan(chosen, torch.device("cpu"), self.scale),
            variants,
            describe_sites(planned),
            variant_letters(chosen),
        )

    def draw(self, row: CacheRow, run: CalibrationRun) -> tuple[torch.Tensor, float]:
        """A picture, and the seconds of its denoising loop."""
        start = time.perf_counter()
        latents = replay(row.tables, row.variants, row.sites, run.inputs, run.latents, noise=run.noise)
        seconds = time.perf_counter() - start
        return self.decode(latents), seconds


def variant_letters(chosen: Plan) -> str:
    """One character for each evaluation: `#` computes everything, `a`, `b`, ... are the other variants."""
    others = [v for v in chosen.variants() if v != "full"]
    return "".join("#" if e.variant == "full" else chr(ord("a") + others.index(e.variant)) for e in chosen.evaluations)


def measure_rows(bench: CacheBench, rows: Sequence[CacheRow], prompts: Sequence[tuple[str, str]]) -> None:
    """Every prompt with every row; the first row is the one that pictures and times are held against."""
    runs = bench.runs([prompt for _, prompt in prompts])
    for row in rows:  # the first call of a graph allocates
        bench.draw(row, runs[0])
    for i, ((kind, prompt), run) in enumerate(zip(prompts, runs, strict=True)):
        truth = None
        for row in rows:
            image, seconds = bench.draw(row, run)
            truth = image if truth is None else truth
            row.seconds.append(seconds)
            row.psnr[kind].append(psnr_db(image, truth))
            row.ssim.append(ssim(image, truth))
            if kind == "full":
                row.exact.append(check_picture(image[0].permute(1, 2, 0).numpy(), prompt).exact)
        if i % 20 == 19:
            print(f"{i + 1} of {len(prompts)} prompts", flush=True)


def describe_cache_row(row: CacheRow, base: CacheRow) -> dict[str, Any]:
    shares_of_time = [a / b for a, b in zip(row.seconds, base.seconds, strict=True)]
    return {
        "label": row.contender.label,
        "method": row.contender.cache.method if row.contender.steps == base.contender.steps else "fewer steps",
        "plan": row.strip,
        "time": statistics.median(shares_of_time),
        "psnr_open_db": statistics.fmean(row.psnr["open"]),
        "psnr_full_db": statistics.fmean(row.psnr["full"]),
        "ssim": statistics.fmean(row.ssim),
        "exact": 100 * statistics.fmean(row.exact),
    }


def plot_results(files: Sequence[Path], output: Path) -> None:
    """Speed-up against PSNR, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(files), figsize=(6.4 * len(files), 5.2), squeeze=False, dpi=120)
    markers = "osD^v<>PXph*d8"
    for panel, path in zip(axes[0], files, strict=True):
        data = json.loads(path.read_text("utf-8"))
        methods = dict.fromkeys(r["method"] for r in data["results"] if r["method"] != "none")
        for i, method in enumerate(sorted(methods, key=lambda m: (m != "auto", m != "fewer steps", m))):
            points = sorted((1 / r["time"], r["psnr_open_db"]) for r in data["results"] if r["method"] == method)
            x, y = zip(*points, strict=True)
            style = {"auto": ("tab:red", "-", 2.2), "fewer steps": ("black", "--", 1.6)}.get(method, (None, ":", 1.0))
            color, line, width = style if method != "mask" else (None, "none", 1.0)  # masks are not one curve
            marker = markers[i % len(markers)]
            panel.plot(x, y, color=color, ls=line, lw=width, marker=marker, markersize=5, label=method)
        panel.set(
            title=f"{data['model']}, {data['steps']} steps", xlabel="speed-up of the denoising loop", xlim=(0.95, 4.6)
        )
        panel.set_ylabel("PSNR against the uncached run, dB")
        panel.set_ylim(bottom=24)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(output, metadata={"Software": None})
    print(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(RECIPES), default="shapes")
    parser.add_argument("--prompts", type=int, default=200, help="of which 64, or a third if fewer, are open ones")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--calibration", type=Path, help="with the plans that `auto` chooses from")
    parser.add_argument(
        "--calibrate-runs", type=int, default=8, help="eager runs that the data-dependent methods look at"
    )
    parser.add_argument("--only", nargs="*", help="labels that begin so, and the uncached and plain ones")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="JSON", help="draw earlier results instead")
    args = parser.parse_args()
    if args.plot:
        plot_results(args.plot, Path(__file__).parents[1] / "docs/images/caches.png")
        return
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    bench = CacheBench(args.model, args.steps, read_calibration(args.calibration) if args.calibration else None)
    bench.observe(args.calibrate_runs)
    rows: list[CacheRow] = []
    for contender in list_contenders(args.model, args.steps):
        wanted = contender.cache.method == "none" or not args.only or contender.label.startswith(tuple(args.only))
        if not wanted:
            continue
        try:
            rows.append(bench.row(contender))
            print(f"{contender.label:34s} {rows[-1].strip}", flush=True)
        except (ExportError, RecipeError) as e:
            print(f"{contender.label:34s} not measured: {e}", flush=True)
    few = min(64, args.prompts // 3)
    prompts = [("open", p) for p in shapes.read_prompt_set("underspecified")[:few]]
    prompts += [("full", p) for p in shapes.read_prompt_set("full")[: args.prompts - few]]
    measure_rows(bench, rows, prompts)
    data = {
        "model": args.model,
        "steps": args.steps,
        "prompts": len(prompts),
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "results": [describe_cache_row(row, rows[0]) for row in rows],
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    print(figures.caches_table(data))


if __name__ == "__main__":
    main()
