"""The page as a file, and its plots and pictures as PNGs beside it: `report.html`, `report-plan-28.png`, ..."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...runtime.errors import RecipeError
from . import inventory, measurements, plots, summary
from .elements import Safe, code
from .facts import Gathered
from .svg import Draw, png, svg

WIDE, NARROW = 940, 340  # pixels
FOOTER = "Made by prebake {}. Every number on this page was counted or measured; times belong to the machine that is named beside them."


@dataclass
class Parts:
    """The plots of a page in the making, and the same as PNGs by name."""

    pngs: dict[str, bytes] = field(default_factory=dict)

    def plot(self, name: str, text: str, draw: Draw) -> dict[str, str]:
        """For the page: once for a screen and once for a phone, and `text` for those who see neither."""
        self.pngs[name] = png(draw, WIDE)
        return {
            "text": text,
            "wide": Safe(svg(draw, WIDE, f"{name}-w")),
            "narrow": Safe(svg(draw, NARROW, f"{name}-n")),
        }


def build(g: Gathered) -> tuple[str, dict[str, bytes]]:
    """The page, and its parts as PNGs by name."""
    from jinja2 import Environment, StrictUndefined

    parts = Parts()
    if g.kept and g.kept.shown and g.kept.png:
        parts.pngs["pictures"] = g.kept.png
    values = {
        "name": g.name,
        "status": g.manifest.status,
        "signed": g.signed,
        "subtitle": summary.subtitle(g.manifest),
        "tiles": list(summary.tiles(g)),
        "missed": g.kept.verified.missed if g.kept else (),
        "gaps": list(summary.gaps(g)),
        "pictures": summary.pictures(g),
        "plan": plan(g, parts),
        "closeness": closeness(g, parts),
        "time": time(g, parts),
        "cost": cost(g, parts),
        "use": inventory.use_section(g),
        "contents": inventory.contents_section(g),
        "footer": FOOTER.format(version("prebake")),
        "style": Safe(read("style.css")),
    }
    values["sections"] = sections(values)
    page: Any = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    page.filters["code"] = code
    return page.from_string(read("page.html.j2")).render(values), parts.pngs


def write(path: Path, g: Gathered) -> list[Path]:
    """Writes the page and its parts; where. Raises RecipeError for a place that cannot be written."""
    page, pngs = build(g)
    files = {path: page.encode(), **{path.with_name(f"{path.stem}-{name}.png"): data for name, data in pngs.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, data in files.items():
            partial_ = target.with_name(f".{target.name}.partial")
            partial_.write_bytes(data)
            partial_.replace(target)
    except OSError as e:
        raise RecipeError(f"{path}: the page cannot be written ({e.strerror}); choose another --output") from e
    return list(files)


def read(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text("utf-8")


def sections(values: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """(id, label) of those that are on the page."""
    every = (
        ("pictures", "Pictures"),
        ("plan", "Plan"),
        ("closeness", "How close"),
        ("time", "Time"),
        ("cost", "Cost"),
        ("use", "Use it"),
        ("contents", "What is in it"),
    )
    return [(id_, label) for id_, label in every if values[id_]]


# --- sections with plots ----------------------------------------------------------------------------------------------


def plan(g: Gathered, parts: Parts) -> dict[str, Any]:
    section = summary.plan_section(g)
    strips = []
    for p in section["strips"]:
        rows = g.strips[p.name]
        draw = partial(plots.plan_strip, plan=p, rows=rows)
        name = "plan-" + re.sub(r"[^A-Za-z0-9-]", "_", p.name)
        drawn = parts.plot(name, plots.strip_text(p, rows), lambda palette, width, draw=draw: draw(palette, width))
        title = plots.titled(p)
        strips.append({"title": title[:1].upper() + title[1:], "said": summary.strip_said(g, p), "plot": drawn})
    return section | {"strips": strips}


def closeness(g: Gathered, parts: Parts) -> dict[str, Any] | None:
    section = measurements.closeness(g)
    if section and section["plot"]:
        assert g.kept
        having = [(p, f) for p, f in measurements.compared(g) if f.relative_error]
        threshold = next((t.threshold for t in g.kept.verified.verdicts if t.figure == "relative_error"), None)
        text = "Error of each evaluation. " + " ".join(
            f"Plan {p.name}: at most {f.relative_error.max:.2g}, on average {f.relative_error.mean:.2g}."
            for p, f in having
            if f.relative_error
        )
        section["plot"] = parts.plot(
            "errors", text, lambda c, w: plots.errors(c, w, having, plots.whole(g.manifest), threshold)
        )
    return section


def time(g: Gathered, parts: Parts) -> dict[str, Any] | None:
    section = measurements.time_section(g)
    if section and (times := g.times):
        table = section["table"]
        text = " ".join(
            f"Plan {row[0]}: " + ", ".join(f"{h} {v} ms" for h, v in zip(table.heads[1:], row[1:], strict=True)) + "."
            for row in table.rows
        )
        section["stages"] = parts.plot(
            "stages", f"Stages of a picture. {text}", lambda c, w: plots.stage_times(c, w, g.shown, times)
        )
        section["steps"] = parts.plot(
            "steps",
            "Time of each evaluation, in the table below.",
            lambda c, w: plots.step_times(c, w, g.shown, plots.whole(g.manifest), times),
        )
    return section


def cost(g: Gathered, parts: Parts) -> dict[str, Any]:
    flops = plots.flops(g.manifest, g.shown)
    text = "Arithmetic of a picture. " + " ".join(
        f"{name}: {', '.join(f'{kind} {value:.3g} GFLOP' for kind, value in row.items()) or 'none'}."
        for name, row in flops.items()
    )
    drawn = parts.plot("cost", text, lambda c, w: plots.stacked(c, w, flops, "GFLOP"))
    return inventory.cost_section(g) | {"plot": drawn}
