"""The page's words and tables about what was measured: closeness, errors and times. `plots.py` draws the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...runtime.plan import Plan
from ..verify.text_table import format_number
from . import plots
from .elements import HtmlTable, machine_text, seconds_text, spread_text
from .facts import PageFacts
from .timing import ReportTimes
from .verification import PlanFigures, VerifyReport


def order_plans(g: PageFacts) -> list[Plan]:
    """All plans, those of the default number of steps first."""
    return [*g.shown, *(p for p in g.plans.values() if p not in g.shown)]


def compared_figures(g: PageFacts) -> list[tuple[Plan, PlanFigures]]:
    """Plans of which there are figures, those of the default steps first."""
    figures = g.verification.verified.plans if g.verification else {}
    return [(p, figures[p.name]) for p in order_plans(g) if p.name in figures]


def closeness_section(g: PageFacts) -> dict[str, Any] | None:
    found = compared_figures(g)
    if not g.verification or not found:
        return None
    v = g.verification.verified
    rows = []
    for plan, f in found:
        near, errors = f.near, f.relative_error
        rows.append(
            (
                plan.name,
                plan.cache,
                format_number(near and near.psnr_db, ".1f"),
                format_number(near and near.psnr_db_min, ".1f"),
                format_number(near and near.ssim, ".4f"),
                format_number(errors and errors.mean, ".2g"),
                format_number(errors and errors.max, ".2g"),
                format_number(f.accuracy_percent, ".1f"),
                str(near.pictures) if near else "-",
            )
        )
    heads = ("plan", "cache", "PSNR dB", "worst", "SSIM", "mean error", "largest", "right %", "pictures")
    said = "Against the pipeline of diffusers in float32, with the same prompts, seeds and steps."
    return {
        "said": said,
        "table": HtmlTable("Closeness of each plan", heads, rows, numbers=range(2, 9)),
        "verdicts": verdict_table(v),
        **errors_section(found),
    }


def errors_section(found: Sequence[tuple[Plan, PlanFigures]]) -> dict[str, Any]:
    having = [(p, f.relative_error) for p, f in found if f.relative_error]
    if not having:
        return {"plot": None}
    longest = max(len(e.max_per_evaluation) for _, e in having)
    columns = [(*e.max_per_evaluation, *[None] * (longest - len(e.max_per_evaluation))) for _, e in having]
    rows = [
        (str(i + 1), *("" if error is None else f"{error:.2e}" for error in row))
        for i, row in enumerate(zip(*columns, strict=True))
        if any(error is not None for error in row)
    ]
    table = HtmlTable(
        "Error of each evaluation",
        ("evaluation", *(f"plan {p.name}" for p, _ in having)),
        rows,
        numbers=range(1, len(having) + 1),
    )
    said = (
        "At every evaluation eager is given the artifact's own inputs, so errors do not add up: the norm of the difference over "
        f"the norm of eager's output, the largest of {having[0][1].pictures} pictures. Marks are hollow where the cache predicts."
    )
    return {"plot": True, "errors_said": said, "errors": table}


def verdict_table(v: VerifyReport) -> HtmlTable | None:
    if not v.verdicts:
        return None
    rows = [
        (t.plan, t.figure, f"{t.value:.4g}", f"{t.threshold:g}", t.over, "passed" if t.passed else "FAILED")
        for t in v.verdicts
    ]
    return HtmlTable("Thresholds", ("plan", "figure", "value", "threshold", "over", ""), rows, numbers=(2, 3))


def time_section(g: PageFacts) -> dict[str, Any] | None:
    """The section about times; None where no time is known at all."""
    section: dict[str, Any] = {"said": "", "stages": None, "verified": None}
    if g.times:
        section |= stage_time_section(g, g.times)
    if g.verification and compared_figures(g) and (rows := verified_time_rows(g)):
        v = g.verification.verified
        heads = ("", "a picture", "speed", "FLOPs of the denoiser")
        section["verified"] = HtmlTable("Times of the verification", heads, rows, numbers=(1, 2, 3))
        section["verified_said"] = (
            f"Eager and artifact took turns in one process, {machine_text(v.machine)}. Medians over pictures."
        )
    return section if g.times or section["verified"] else None


def stage_time_section(g: PageFacts, times: ReportTimes) -> dict[str, Any]:
    names = plots.stage_names(times)
    rows = []
    for plan in g.shown:
        t = times.plans[plan.name]
        stages = [spread_text([s.get(name, 0.0) for s in t.stages_ms]) for name in names]
        rows.append((plan.name, spread_text([s * 1e3 for s in t.image_s]), *stages))
    heads = ("plan", "a picture", *(name.replace("_", " ") for name in names))
    columns = [list(zip(*times.plans[p.name].evaluations_ms, strict=True)) for p in g.shown]
    evaluations = [
        (str(i + 1), *(f"{spread_text(c[i])} {p.evaluations[i].variant}" if i < len(c) else "" for c, p in zip(columns, g.shown, strict=True)))
        for i in range(max(map(len, columns)))
    ]  # fmt: skip
    said = (
        f"Measured when this page was made, {machine_text(times.machine)}: {times.runs} pictures with each plan in turn, after one to "
        f"warm up. Opening the artifact took {seconds_text(times.load_s)}. A ± is half the distance of the quartiles. How many times as "
        "fast as diffusers that is, `prebake bench` says."
    )
    return {
        "said": said,
        "stages": True,
        "table": HtmlTable("Stages, milliseconds", heads, rows, numbers=range(1, len(heads))),
        "steps_said": "Median milliseconds of each evaluation of the denoiser, with the quartiles as a line. "
        "Blue computes everything, orange does not.",
        "evaluations": HtmlTable(
            "Evaluations, milliseconds",
            ("evaluation", *(f"plan {p.name}" for p in g.shown)),
            evaluations,
            numbers=range(1, len(g.shown) + 1),
        ),
    }


def verified_time_rows(g: PageFacts) -> list[tuple[str, ...]]:
    assert g.verification
    found, rows = compared_figures(g), []
    for steps in dict.fromkeys(plan.steps for plan, _ in found):
        eager = g.verification.verified.eager.get(steps)
        if eager and eager.image_s is not None:
            rows.append((f"eager float32, {steps} steps", seconds_text(eager.image_s), "1.00×", "100%"))
        for plan, f in found:
            if plan.steps == steps and f.image_s is not None:
                share = f"{f.flops_share_percent:.0f}%"
                rows.append(
                    (plots.plan_title(plan), seconds_text(f.image_s), format_number(f.speedup, ".2f", "×"), share)
                )
    return rows
