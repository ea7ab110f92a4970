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
from .elements import SafeMarkup, code_markup
from .facts import PageFacts
from .svg import DrawFigure, render_png, render_svg

WIDE, NARROW = 940, 340  # pixels
FOOTER = "Made by prebake {}. Every number on this page was counted or measured; times belong to the machine that is named beside them."


@dataclass
class PageParts:
    """The plots of a page in the making, and the same as PNGs by name."""

    pngs: dict[str, bytes] = field(default_factory=dict)

    def plot(self, name: str, text: str, draw: DrawFigure) -> dict[str, str]:
        """One plot twice, for a screen and for a phone, and `text` for those who see neither."""
        self.pngs[name] = render_png(draw, WIDE)
        return {
            "text": text,
            "wide": SafeMarkup(render_svg(draw, WIDE, f"{name}-w")),
            "narrow": SafeMarkup(render_svg(draw, NARROW, f"{name}-n")),
        }


def build_page(g: PageFacts) -> tuple[str, dict[str, bytes]]:
    """The page, and its parts as PNGs by name."""
    from jinja2 import Environment, StrictUndefined

    parts = PageParts()
    if g.verification and g.verification.shown and g.verification.png:
        parts.pngs["pictures"] = g.verification.png
    values = {
        "name": g.name,
        "status": g.manifest.status,
        "signed": g.signed,
        "subtitle": summary.subtitle(g.manifest),
        "tiles": list(summary.summary_tiles(g)),
        "missed": g.verification.verified.missed if g.verification else (),
        "gaps": list(summary.page_gaps(g)),
        "pictures": summary.pictures_section(g),
        "plan": plot_plan_section(g, parts),
        "closeness": plot_closeness_section(g, parts),
        "time": plot_time_section(g, parts),
        "cost": plot_cost_section(g, parts),
        "use": inventory.use_section(g),
        "contents": inventory.contents_section(g),
        "footer": FOOTER.format(version("prebake")),
        "style": SafeMarkup(read_asset("style.css")),
    }
    values["sections"] = page_sections(values)
    page: Any = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    page.filters["code"] = code_markup
    return page.from_string(read_asset("page.html.j2")).render(values), parts.pngs


def write_page(path: Path, g: PageFacts) -> list[Path]:
    """Writes the page and its parts; where. Raises RecipeError for a place that cannot be written."""
    page, pngs = build_page(g)
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


def read_asset(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text("utf-8")


def page_sections(values: dict[str, Any]) -> Sequence[tuple[str, str]]:
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


def plot_plan_section(g: PageFacts, parts: PageParts) -> dict[str, Any]:
    section = summary.plan_section(g)
    strips = []
    for p in section["strips"]:
        rows = g.strips[p.name]
        draw = partial(plots.plot_plan_strip, plan=p, rows=rows)
        name = "plan-" + re.sub(r"[^A-Za-z0-9-]", "_", p.name)
        drawn = parts.plot(name, plots.strip_text(p, rows), lambda palette, width, draw=draw: draw(palette, width))
        title = plots.plan_title(p)
        strips.append({"title": title[:1].upper() + title[1:], "said": summary.strip_sentence(g, p), "plot": drawn})
    return section | {"strips": strips}


def plot_closeness_section(g: PageFacts, parts: PageParts) -> dict[str, Any] | None:
    section = measurements.closeness_section(g)
    if section and section["plot"]:
        assert g.verification
        having = [(p, f) for p, f in measurements.compared_figures(g) if f.relative_error]
        text = "Error of each evaluation. " + " ".join(
            f"Plan {p.name}: at most {f.relative_error.max:.2g}, on average {f.relative_error.mean:.2g}."
            for p, f in having
            if f.relative_error
        )
        section["plot"] = parts.plot(
            "errors", text, lambda c, w: plots.plot_errors(c, w, having, g.manifest.whole_graphs)
        )
    return section


def plot_time_section(g: PageFacts, parts: PageParts) -> dict[str, Any] | None:
    section = measurements.time_section(g)
    if section and (times := g.times):
        table = section["table"]
        text = " ".join(
            f"Plan {row[0]}: " + ", ".join(f"{h} {v} ms" for h, v in zip(table.heads[1:], row[1:], strict=True)) + "."
            for row in table.rows
        )
        section["stages"] = parts.plot(
            "stages", f"Stages of a picture. {text}", lambda c, w: plots.plot_stage_times(c, w, g.shown, times)
        )
        section["steps"] = parts.plot(
            "steps",
            "Time of each evaluation, in the table below.",
            lambda c, w: plots.plot_step_times(c, w, g.shown, g.manifest.whole_graphs, times),
        )
    return section


def plot_cost_section(g: PageFacts, parts: PageParts) -> dict[str, Any]:
    flops = plots.picture_gflops(g.manifest, g.shown)
    text = "Arithmetic of a picture. " + " ".join(
        f"{name}: {', '.join(f'{kind} {value:.3g} GFLOP' for kind, value in row.items()) or 'none'}."
        for name, row in flops.items()
    )
    drawn = parts.plot("cost", text, lambda c, w: plots.plot_stacked_bars(c, w, flops, "GFLOP"))
    return inventory.cost_section(g) | {"plot": drawn}
