"""Markdown of measured figures: what a benchmark wrote as JSON goes in, and a table or a sentence comes out.

The benchmarks print with these functions, and `tables.py` writes with them into the pages. Only the standard library is
imported, so that pages can be held to their files in no time. `save_figures` writes a file, with the machine and the command.
"""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Any
"""The parsed JSON of one benchmark."""


def save_figures(figures: Mapping[str, Any], output: Path | None) -> None:
    """Writes them with the machine and the command; nothing without `output`."""
    from prebake.exporter.verify.report import machine_facts

    if output:
        command = shlex.join(["python", *sys.argv])
        kept = {"command": command, "machine": machine_facts(), **figures}
        output.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")


# --- parts of tables -------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.02 else f"{seconds * 1e3:.0f} ms"


def format_mib(size: float) -> str:
    return f"{size / 2**20:,.1f}" if size < 100 * 2**20 else f"{size / 2**20:,.0f}"


def format_error(error: float) -> str:
    """`8e-4`; two digits from a thousandth on, and nothing for none."""
    shown = f"{error:.1e}" if error >= 1e-3 else f"{error:.0e}"
    return shown.replace("e-0", "e-") if error else ""


def median_ratio(base: Sequence[float], own: Sequence[float]) -> float:
    """The median over rounds of one way's time over another's."""
    return statistics.median(b / o for b, o in zip(base, own, strict=True))


def machine_sentence(machine: Mapping[str, Any]) -> str:
    """`one thread of an AMD EPYC, torch 2.13.0`."""
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{threads} of an {machine['cpu']}, torch {machine['torch'].partition('+')[0]}"


# --- what each benchmark found ---------------------------------------------------------------------------------------


def verify_table(report: Figures) -> str:
    """The table of `prebake verify --source`, with what it was measured on."""
    (eager,) = report["eager"].values()
    steps = next(iter(report["eager"]))
    rows = [
        [
            f"diffusers, eager float32, {steps} steps",
            f"{eager['image_s']:.3f} s",
            "1.00x",
            "",
            "",
            accuracy_text(eager),
        ],
    ]
    for plan in sorted(report["plans"].values(), key=lambda plan: plan["speedup"]):
        full = plan["evaluations"].count("full")
        whole = full == len(plan["evaluations"])
        said = "every step computed" if whole else f"{full} of {plan['steps']} steps computed"
        mark = "" if whole else "**"
        close, speed = plan["pictures"], f"{mark}{plan['speedup']:.2f}x{mark}"
        row = [f"{mark}artifact, int8, {said}{mark}", f"{plan['image_s']:.3f} s", speed]
        rows.append([*row, f"{close['psnr_db']:.1f} dB", f"{close['ssim']:.3f}", accuracy_text(plan)])
    began = f"Measured on {machine_sentence(report['machine'])}.\n\n"
    return began + markdown_table(
        ["`shapes`, 64 x 64", "per image", "speed", "PSNR", "SSIM", "prompts drawn right"], rows
    )


def accuracy_text(drawn: Mapping[str, Any]) -> str:
    return f"{drawn['accuracy_percent']:.1f}%"


WAY_LABELS = {
    "eager float32": "diffusers, eager float32",
    "eager bfloat16": "diffusers, eager bfloat16",
    "torch.compile float32": "`torch.compile` float32",
    "torch.compile bfloat16": "`torch.compile` bfloat16",
    "AOTInductor int8 (torchao)": "AOTInductor, int8 by torchao",
    "OpenVINO bfloat16": "OpenVINO, bfloat16",
    "OpenVINO int8 (NNCF)": "OpenVINO, int8 (NNCF, static activations)",
    "prebake: int8 by ONNX Runtime": "prebake, `onnxruntime`, int8",
    "prebake: int8, float32": "prebake, `aoti`, int8, the rest float32",
    "prebake: int8, bfloat16 attention": "prebake, `aoti`, int8, attention bfloat16, the rest float32",
    "prebake: int8, bfloat16": "prebake, `aoti`, int8, the rest bfloat16",
    "prebake: int8 with convolutions, bfloat16": "prebake, `aoti`, int8 with convolutions, the rest bfloat16",
    "artifact: full": "**artifact, int8, all computed**",
    "artifact: reuse": "artifact, int8, attention reused (`pab`)",
}
"""What the pages call them, in the order of the rows; others follow by their own names."""
MODEL_LABELS = {
    "flux-88m": "`flux-88m`, 640 tokens",
    "flux-284m": "`flux-284m`, 1,152 tokens",
    "unet": "SDXL-like UNet, 512 x 512",
}


def evaluations_table(*models: Figures) -> str:
    """Of `denoiser.py` and `cpu.py`: for each model the time of one evaluation, the ratio to eager float32, and the error."""
    head: list[str] = [""]
    for model in models:
        head += [model_label(model), "", "error"]
    ways = dict.fromkeys([*WAY_LABELS, *(str(way) for model in models for way in model["seconds"])])
    seen = (way for way in ways if any(way in model["seconds"] for model in models))
    return markdown_table(
        head, ([WAY_LABELS.get(way, way), *(c for m in models for c in way_cells(m, way))] for way in seen)
    )


def model_label(model: Figures) -> str:
    """`wide, 230M, 1,040 tokens`."""
    name = model["model"]
    return MODEL_LABELS.get(name) or f"`{name}`, {model['parameters'] / 1e6:.0f}M, {model['tokens']:,} tokens"


def way_cells(model: Figures, way: str) -> list[str]:
    """Time, ratio, error; the fastest way is bold. Of an evaluation that reuses stored values there is no error to speak of."""
    seconds, errors = model["seconds"], model["errors"]
    if way not in seconds:
        return ["", "", ""]
    medians = {w: statistics.median(s) for w, s in seconds.items() if w in errors}
    mark = "**" if way == min(medians, key=lambda w: medians[w]) else ""
    times = median_ratio(seconds["eager float32"], seconds[way]) if way != "eager float32" else 1.0
    shown = format_ms(statistics.median(seconds[way])), f"{times:.2f}x"
    return [*(f"{mark}{cell}{mark}" for cell in shown), format_error(errors.get(way, 0.0))]


def reuse_sentence(model: Figures) -> str:
    """A sentence on what reusing all attention saves."""
    flops, seconds = model["flops"], model["seconds"]
    name = next(name for name in flops if name != "full")
    time = median_ratio(seconds[f"artifact: {name}"], seconds["artifact: full"])
    return f"Reusing attention leaves {flops[name] / flops['full']:.0%} of the FLOPs of `{model['model']}` and {time:.0%} of the time.\n"


def cpu_table(models: Figures) -> str:
    """The models in the order of MODELS."""
    return evaluations_table(*sorted(models, key=lambda model: list(MODEL_LABELS).index(model["model"])))


def openvino_table(models: Figures) -> str:
    """prebake beside OpenVINO's int8, on FLUX as a recipe would have it, and on the UNet with its convolutions."""
    named = {model["model"]: model for model in models}
    told = [
        ("The FLUX `flux-88m`", named["flux-88m"], "prebake: int8, bfloat16"),
        ("a UNet with `quantize.convolutions`", named["unet"], "prebake: int8 with convolutions, bfloat16"),
    ]
    theirs = "OpenVINO int8 (NNCF)"
    said = []
    for name, model, ours in told:
        own, other = (statistics.median(model["seconds"][way]) * 1e3 for way in (ours, theirs))
        share = model["errors"][ours] / model["errors"][theirs]
        said.append(
            f"{name} takes {own:.0f} ms an evaluation where OpenVINO's int8 takes {other:.0f}, with {share:.0%} of its error"
        )
    return ";\n".join(said) + ".\n"


def headline_table(report: Figures, wide: Figures, models: Figures, cold: Figures) -> str:
    """The five figures of the README, each beside what a user would take instead."""
    (eager,) = report["eager"].values()
    plan = max(report["plans"].values(), key=lambda plan: plan["speedup"])
    seconds = wide["seconds"]
    own, base, compiled = (
        statistics.median(seconds[way]) for way in ("artifact: full", "eager float32", "torch.compile bfloat16")
    )
    flux = next(model["seconds"] for model in models if model["model"] == "flux-88m")
    ours, theirs = (statistics.median(flux[way]) for way in ("prebake: int8, bfloat16", "OpenVINO int8 (NNCF)"))
    artifact = cold["artifacts"][0]
    starts = {name: statistics.median(map(total_seconds, runs)) for name, runs in artifact["runs"].items()}
    rows = [
        [
            "one 64 x 64 image, 28 steps",
            f"**{plan['image_s']:.3f} s**",
            f"{eager['image_s']:.3f} s, diffusers in float32",
        ],
        [
            "how close that image is",
            f"**{plan['pictures']['psnr_db']:.1f} dB PSNR**",
            "diffusers in float32, same seed",
        ],
        [
            f"one step of a {wide['parameters'] / 1e6:.0f}M FLUX",
            f"**{format_ms(own)}**",
            f"{format_ms(base)}, diffusers in float32; {format_ms(compiled)}, `torch.compile` in bfloat16",
        ],
        ["one step of an 88M FLUX", f"**{format_ms(ours)}**", f"{format_ms(theirs)}, OpenVINO in int8"],
        [
            "from process start to the first image",
            f"**{starts[artifact['name']]:.1f} s**",
            f"{starts['eager']:.1f} s, diffusers; {starts['compile']:.1f} s, `torch.compile`",
        ],
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in (["", "prebake, int8", "beside"], ["---"] * 3, *rows))


def cold_start_table(found: Figures) -> str:
    """Medians over turns of each stage; ratios are medians of the turns' own."""
    rows = []
    for artifact in found["artifacts"]:
        for name, runs in sorted(artifact["runs"].items(), key=lambda item: item[0] != artifact["name"]):
            own = name == artifact["name"]
            stages = [statistics.median(run["seconds"][stage] for run in runs) for stage in found["stages"]]
            figures = [
                *stages,
                statistics.median(map(total_seconds, runs)),
                statistics.median(r["second_image"] for r in runs),
            ]
            shares = [
                f"{baseline_share(artifact, b):.3f}" if own and b in artifact["runs"] else ""
                for b in ("eager", "compile")
            ]
            label = f"**{name}**" if own else f"diffusers, {name}"
            rows.append([label, *(f"{s:.2f}" for s in figures), *shares])
    return markdown_table(["seconds", *found["stages"], "total", "second image", "of eager", "of compiled"], rows)


def total_seconds(run: Mapping[str, Any]) -> float:
    return sum(run["seconds"].values())


def baseline_share(artifact: Mapping[str, Any], baseline: str) -> float:
    """The median over turns of the artifact's share of a baseline's time."""
    runs = artifact["runs"]
    return median_ratio(
        [total_seconds(run) for run in runs[artifact["name"]]], [total_seconds(run) for run in runs[baseline]]
    )


def serving_items(cold: Figures, calls: Figures) -> str:
    """What starting and calling an artifact costs, as two items of a list."""
    artifact = cold["artifacts"][0]
    seconds = statistics.median(map(total_seconds, artifact["runs"][artifact["name"]]))
    call = min(calls["graphs"], key=lambda graph: abs(graph["inputs"] - 9))
    return (
        f"- From process start to the first picture `shapes` takes {seconds:.1f} s: {baseline_share(artifact, 'eager'):.2f} of eager "
        f"diffusers' time, {baseline_share(artifact, 'compile'):.2f} of\n  `torch.compile`'s (`{command_text(cold)}`, {len(artifact['runs']['eager'])} turns, one thread).\n"
        f"- Comparing a call with its contract takes {call['contract_us']:.1f} µs for the {call['inputs']} inputs of `shapes` "
        f"(`{command_text(calls)}`).\n"
    )


def command_text(found: Figures) -> str:
    """The command, without where its figures went."""
    return found["command"].partition(" --output")[0]


def contract_table(found: Figures) -> str:
    head = ["graph of FLUX.1-dev", "inputs", "µs a call", "µs to read as many `dtype`s", "µs to compare as many shapes"]
    names = ("contract_us", "dtypes_us", "shapes_us")
    return markdown_table(
        head, ([g["graph"], str(g["inputs"]), *(f"{g[n]:.1f}" for n in names)] for g in found["graphs"])
    )


def memory_table(found: Figures) -> str:
    head = ["artifact", "weights MiB", "first process MiB", "each further one MiB"]
    head += ["of it without artifact MiB", "share of weights"]
    rows = []
    for a in found["artifacts"]:
        sizes = [format_mib(a[name]) for name in ("weights_bytes", "first_bytes", "further_bytes", "empty_bytes")]
        rows.append([a["artifact"], *sizes, f"{(a['further_bytes'] - a['empty_bytes']) / a['weights_bytes']:.0%}"])
    return markdown_table(head, rows)


# --- caches, of caches-*.json ----------------------------------------------------------------------------------------

SHOWN_CACHES = ("auto 0.25", "auto 0.4", "auto 0.5", "mask 1111(001) order 1, output", "teacache 0.1", "14 steps")
"""The rows of the page that explains caches."""


def caches_table(found: Figures) -> str:
    """All that `caches.py` drew; `gain_text` is against fewer steps in the same time."""
    head = [f"{found['model']}, {found['steps']} steps", "time", "PSNR open", "gain", "PSNR full", "SSIM", "exact"]
    rows = []
    for r in found["results"]:
        names = ("psnr_full_db", "ssim", "exact")
        figures = (f"{r[name]:{form}}" for name, form in zip(names, (".1f", ".4f", ".1f"), strict=True))
        rows.append(
            [r["label"], f"{r['time']:.2f}", f"{r['psnr_open_db']:.1f}", gain_text(found["results"], r), *figures]
        )
    return markdown_table(head, rows)


def shown_caches_table(found: Figures) -> str:
    """The rows of SHOWN_CACHES, and their speed-up."""
    head = [f"`{found['model']}`, {found['steps']} steps", "speed-up", "PSNR", "against fewer steps", "drawn right"]
    rows, results = [], {r["label"]: r for r in found["results"]}
    for r in map(results.__getitem__, SHOWN_CACHES):
        plain = r["method"] == "fewer steps"
        mark, more = "**" if r["method"] == "auto" else "", gain_text(found["results"], r)
        figures = f"{mark}{1 / r['time']:.2f}x{mark}", f"{mark}{r['psnr_open_db']:.1f} dB{mark}", more and f"{more} dB"
        rows.append([f"{r['label']}, no cache" if plain else f"`{r['label']}`", *figures, f"{r['exact']:.1f}%"])
    return markdown_table(head, rows)


def gain_text(results: Sequence[Mapping[str, Any]], r: Mapping[str, Any]) -> str:
    """A row's gain over plain steps in its time; a bound where its time is longer or shorter than all that were measured."""
    if r["method"] in ("none", "fewer steps"):
        return ""
    plain = [p["time"] for p in results if p["method"] == "fewer steps"]
    sign = "≤ " if r["time"] > max(plain) else "≥ " if r["time"] < min(plain) else ""
    return f"{sign}{r['psnr_open_db'] - plain_psnr_at(results, r['time']):+.1f}"


def plain_psnr_at(results: Sequence[Mapping[str, Any]], share: float) -> float:
    """PSNR on open prompts of plain steps that take this share of the time, between the measured numbers of steps."""
    plain = sorted((r["time"], r["psnr_open_db"]) for r in results if r["method"] == "fewer steps")
    for (t0, p0), (t1, p1) in itertools.pairwise(plain):
        if t0 <= share <= t1:
            return p0 + (p1 - p0) * (share - t0) / (t1 - t0)
    return plain[0][1] if share < plain[0][0] else plain[-1][1]
