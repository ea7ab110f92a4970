"""Outcome tables: what a verification found, for people: from the plain values of `report.py` to tables on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from ...runtime.manifest import Manifest
from .closeness import largest_error, smallest_psnr_db
from .outcome import Outcome
from .report import describe_outcome
from .text_table import Cells, format_number, print_cells


def print_outcome(manifest: Manifest, outcome: Outcome, file: TextIO) -> None:
    """Tables on `file`: drawn by rich where it is installed, columns of plain text where it is not."""
    described = describe_outcome(manifest, outcome)
    tables = [("golden vectors, replayed here", golden_cells(described["golden"]))]
    if outcome.comparison:
        tables.append(("closeness to eager float32", closeness_cells(described)))
        tables.append((f"speed, {described['machine']['threads']} threads", speed_cells(described)))
        tables.append(("variants", variant_cells(described["variants"])))
        tables.append(("thresholds of the recipe", verdict_cells(described["verdicts"])))
    for title, cells in tables:
        print_cells(title, cells, file)
    for sentence in described["not_measured"]:
        print(f"note: {sentence}", file=file)
    for sentence in described["missed"]:
        print(f"FAILED: {sentence}", file=file)


def golden_cells(replays: Mapping[str, Any]) -> Cells:
    cells: Cells = [("plan", "denoiser", "latents", "picture", "allowed", "")]
    for plan, g in replays.items():
        allowed = f"{g['tolerance']['relative_error']:g}, {g['tolerance']['image_psnr_db']:g} dB"
        how = (
            ("same to the bit" if g["bitwise"] else f"passed: {g['tolerance']['reason']}") if g["passed"] else "FAILED"
        )
        figures = (g["relative_error_per_evaluation"], g["final_latents_relative_error"], g["image_psnr_db"])
        picture = f"{figures[2]:.1f} dB" if figures[2] is not None else ""
        cells.append(
            (plan, f"{largest_error(figures[0]):.2g}", format_number(figures[1], ".2g"), picture, allowed, how)
        )
    return cells


def closeness_cells(described: Mapping[str, Any]) -> Cells:
    """How close each plan's pictures and evaluations are to eager's, and what share of the prompts eager and plans draw right."""
    cells: Cells = [("", "PSNR dB", "worst", "SSIM", "max error", "of bf16", "cache dB", "right %")]
    for steps, e in described["eager"].items():
        right = format_number(e["accuracy_percent"], ".1f")
        cells.append((f"eager, {steps} steps", "", "", "", "", "", "", right))
        if rounded := e["bfloat16_psnr_db"]:
            mean, worst = f"{statistics.fmean(rounded):.1f}", f"{smallest_psnr_db(rounded):.1f}"
            cells.append((f"in bfloat16, {steps} steps", mean, worst, "", "", "1", "", ""))
    for name, plan in described["plans"].items():
        near, errors = plan["pictures"] or plan["checked_pictures"] or {}, plan["relative_error"] or {}
        compiled, cached = plan["compiled_error"] or {}, plan["cached"] or {}
        cells.append(
            (
                plan_label(name, plan),
                format_number(near.get("psnr_db"), ".1f"),
                format_number(near.get("psnr_db_min"), ".1f"),
                format_number(near.get("ssim"), ".4f"),
                format_number(errors.get("max"), ".2g"),
                format_number(compiled.get("of_bfloat16_max"), ".2g"),
                format_number(cached.get("uncached_psnr_db"), ".1f"),
                format_number(plan["accuracy_percent"], ".1f"),
            )
        )
    return cells


def speed_cells(described: Mapping[str, Any]) -> Cells:
    """What a picture and a step take: eager's line for each number of steps, and a line for each plan."""
    cells: Cells = [("", "s/image", "ms/step", "speed", "FLOPs %")]
    for steps, e in described["eager"].items():
        times = (format_number(e["image_s"], ".3f"), format_number(e["evaluation_ms"], ".2f"))
        cells.append((f"eager, {steps} steps", *times, "1.00x", ""))
    for name, plan in described["plans"].items():
        cells.append(
            (
                plan_label(name, plan),
                format_number(plan["image_s"], ".3f"),
                format_number(plan["evaluation_ms"], ".2f"),
                format_number(plan["speedup"], ".2f", "x"),
                format_number(plan["flops_share_percent"], ".0f"),
            )
        )
    return cells


def plan_label(name: str, plan: Mapping[str, Any]) -> str:
    return f"plan {name}" + ("" if plan["cache"] == "none" else f", cache {plan['cache']}")


def variant_cells(measured: Mapping[str, Any]) -> Cells:
    cells: Cells = [("variant", "ms", "time %", "FLOPs %")]
    for name, v in measured.items():
        cells.append(
            (
                name,
                format_number(v["evaluation_ms"], ".2f"),
                format_number(v["time_share_percent"], ".1f"),
                format_number(v["flops_share_percent"], ".1f"),
            )
        )
    return cells


def verdict_cells(verdicts: Sequence[Mapping[str, Any]]) -> Cells:
    cells: Cells = [("plan", "figure", "value", "threshold", "over", "")]
    for v in verdicts:
        cells.append(
            (
                v["plan"],
                v["figure"],
                f"{v['value']:.4g}",
                f"{v['threshold']:g}",
                v["over"],
                "passed" if v["passed"] else "FAILED",
            )
        )
    return cells
