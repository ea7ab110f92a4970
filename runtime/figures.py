"""Figures of a plan: what the manifest says of it, and what a verification measured, as `reports/verify.json` has it.

Files in `reports/` are covered by no hash: what they say is for people, and nothing is decided by it. A report that is not
there, that cannot be read, or that is about other weights or another plan gives None for what it would have said.
`exporter/verify/report.py` writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import printable_line
from .manifest import Manifest
from .plan import Plan
from .text import align_columns

MAX_REPORT_BYTES = 64 << 20  # a report has some kilobytes


@dataclass(frozen=True)
class PlanFigures:
    """One plan, and what was measured of it against the eager float32 pipeline with the same prompts and seeds.

    `computed` of the plan's `evaluations` compute everything, the others reuse what a cache kept. `psnr_db` is the mean over
    pictures in decibels, `worst_psnr_db` the smallest of them; `relative_error` is the largest of one evaluation (0.01 is one
    percent). `speed` is eager's time over the artifact's for a picture, on the machine of the report, and `picture_seconds` the
    artifact's. Each of these is None where nobody has measured it.
    """

    name: str
    steps: int
    cache: str
    scheduler: str
    evaluations: int
    computed: int
    psnr_db: float | None = None
    worst_psnr_db: float | None = None
    relative_error: float | None = None
    speed: float | None = None
    picture_seconds: float | None = None

    def __str__(self) -> str:
        return " ".join(cell for cell in self.cells() if cell)

    def cells(self) -> tuple[str, ...]:
        """Name, work, loss and speed, for a table."""
        loss = "" if self.psnr_db is None else f"{self.psnr_db:.1f} dB"
        worst = "" if self.worst_psnr_db is None else f"(worst {self.worst_psnr_db:.1f})"
        speed = "" if self.speed is None else f"{self.speed:.2f}x eager"
        work = f"{self.computed} of {self.evaluations} evaluations computed"
        return self.name, f"{self.steps} steps,", f"{work},", f"cache {self.cache}", loss, worst, speed


def format_plans(plans: Mapping[str, PlanFigures]) -> list[str]:
    """A line for each plan, in aligned columns."""
    return [printable_line(line) for line in align_columns([plan.cells() for plan in plans.values()], right=(4, 6))]


def plan_figures(folder: Path, manifest: Manifest, plans: Mapping[str, Plan]) -> dict[str, PlanFigures]:
    """Figures by plan name, in the order of `plans`."""
    reports = {path: read_report(folder / path, manifest) for path in map(report_path, ("", *plans))}
    found = {}
    for name, plan in plans.items():
        measured = next(
            (m for path in (report_path(""), report_path(name)) if (m := plan_report(reports[path], plan))), {}
        )
        found[name] = describe_plan(manifest, plan, measured)
    return found


def describe_plan(manifest: Manifest, plan: Plan, measured: Mapping[str, Any]) -> PlanFigures:
    """The plan's figures, `measured` being what a report says of it."""
    whole = manifest.whole_graphs
    return PlanFigures(
        plan.name,
        plan.steps,
        plan.cache,
        plan.scheduler,
        len(plan.evaluations),
        sum(e.variant in whole for e in plan.evaluations),
        finite_number(measured, "pictures", "psnr_db"),
        finite_number(measured, "pictures", "psnr_db_min"),
        finite_number(measured, "relative_error", "max"),
        finite_number(measured, "speedup"),
        finite_number(measured, "image_s"),
    )


def report_path(plan: str) -> str:
    """The report of the whole artifact for "", or the one that `prebake plan` wrote about the plans of that number of steps."""
    return (
        f"reports/plan-{plan.partition('@')[0].removesuffix('-uncached')}/verify.json"
        if plan
        else "reports/verify.json"
    )


def read_report(path: Path, manifest: Manifest) -> Mapping[str, Any]:
    """The report's plans, none where it is no report about the manifest's weights."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_REPORT_BYTES:
            return {}
        report = json.loads(path.read_bytes())
        plans = report["plans"] if report["model"]["sha256"] == manifest.source.sha256 else {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}
    return plans if isinstance(plans, dict) else {}


def plan_report(plans: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    """What the report says of the plan, nothing where its plan of that name has other evaluations."""
    said = plans.get(plan.name)
    same = isinstance(said, dict) and said.get("evaluations") == [e.variant for e in plan.evaluations]
    return said if isinstance(said, dict) and same else {}


def finite_number(said: Mapping[str, Any], *keys: str) -> float | None:
    value: Any = said
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None
