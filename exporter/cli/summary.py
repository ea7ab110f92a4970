"""What an export achieved, for `prebake export` to print: how close to eager, on average and at worst, how fast, how large.

Read from the finished folder: `manifest.json`, and `reports/verify.json` where it was compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPORT = Path("reports/verify.json")


def summarize_artifact(folder: Path) -> dict[str, Any]:
    """`status`, `bytes`, where something is quantized those of weights by component, now and before, and of a compared artifact `report`, and by plan the figures of its comparison; nothing of a folder
    without a manifest."""
    from ...runtime.manifest import read_manifest
    from ...runtime.text import folder_bytes, weights_bytes

    if not (folder / "manifest.json").is_file():
        return {}
    manifest = read_manifest(folder)
    found: dict[str, Any] = {"status": manifest.status, "bytes": sum(folder_bytes(manifest).values())}
    if manifest.unquantized_bytes:
        found |= {"weights": weights_bytes(manifest), "unquantized_bytes": manifest.unquantized_bytes}
    if not (folder / REPORT).is_file():
        return found
    told = json.loads((folder / REPORT).read_text("utf-8"))
    figures = {name: plan_figures(plan, told["eager"]) for name, plan in told["plans"].items()}
    return {**found, "report": str(folder / REPORT), "verified_plans": figures}


def plan_figures(plan: Mapping[str, Any], eager: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one plan; `psnr_db` and `psnr_db_min` are of the recipe's pictures, or else of the checked ones. The
    worst of both is `psnr_db_min`."""
    kinds = [kind for kind in (plan["pictures"], plan["checked_pictures"]) if kind]
    worst = [kind["psnr_db_min"] for kind in kinds]
    return {
        "cache": plan["cache"],
        "pictures": sum(kind["pictures"] for kind in kinds),
        "psnr_db": kinds[0]["psnr_db"] if kinds else None,
        "psnr_db_min": min(worst, key=lambda db: -1e9 if isinstance(db, str) else db, default=None),
        "accuracy_percent": plan["accuracy_percent"],
        "eager_accuracy_percent": eager[str(plan["steps"])]["accuracy_percent"],
        "image_s": plan["image_s"],
        "speedup": plan["speedup"],
    }


def summary_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines below an artifact's path: a table of its plans, then size, time and where the report is."""
    from ...runtime.text import align_columns, format_bytes, weights_text

    if "status" not in result:
        return
    if plans := result.get("verified_plans"):
        head = ("plan", "PSNR mean", "worst", "of", "right", "eager", "s/image", "speed-up")
        yield from align_columns([head, *(plan_cells(name, plan) for name, plan in plans.items())], right=range(1, 8))
    if before := result.get("unquantized_bytes"):
        yield f"weights: {weights_text(result['weights'], before)}"
    took = f"{format_bytes(result['bytes'])}, exported in {sum(result['seconds'].values()):.0f} s"
    if "report" not in result:
        yield f"{result['status']}, {took}"
        return
    report = Path(result["report"])
    pictures = f"; {report.with_suffix('.png').name} shows the worst pictures first"
    yield f"{result['status']}, {took}"
    yield f"report: {report}{pictures if report.with_suffix('.png').is_file() else ''}"


def plan_cells(name: str, plan: Mapping[str, Any]) -> tuple[str, ...]:
    label = name if plan["cache"] == "none" else f"{name}, cache {plan['cache']}"
    return (
        label,
        number_text(plan["psnr_db"], ".1f", " dB"),
        number_text(plan["psnr_db_min"], ".1f", " dB"),
        str(plan["pictures"]),
        number_text(plan["accuracy_percent"], ".1f", "%"),
        number_text(plan["eager_accuracy_percent"], ".1f", "%"),
        number_text(plan["image_s"], ".2f"),
        number_text(plan["speedup"], ".2f", "x"),
    )


def number_text(value: float | str | None, form: str, unit: str = "") -> str:
    """`-` for what was not measured; "nan" and the like are texts in a report."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:{form}}{unit}"
