"""The plots of the page: functions from figures to matplotlib, each for a given width in pixels.

Widths are given so that the same plot can be drawn once for a phone and once for a screen, with letters of one size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime.attachment.facts import graph_name
from ...runtime.manifest import Manifest
from ...runtime.plan import Plan
from ..sites.marks import Action
from .plan_strip import ACTION_WORDS, StripRow
from .svg import Palette
from .timing import DENOISER_STAGE, REST_STAGE, ReportTimes
from .verification import PlanFigures

DPI = 72  # so that a point is a pixel
MAX_STRIP_ROWS = 24  # of a strip
ACTION_STYLES: Mapping[Action, tuple[str, float]] = {  # colour, and the height of its cell
    "compute": ("blue", 1.0),
    "combine": ("orange", 0.5),
    "pass": ("sky", 0.8),
    "zero": ("grey", 0.16),
    "identity": ("green", 0.28),
}
SERIES_STYLES = (
    ("blue", "o"),
    ("orange", "s"),
    ("green", "^"),
    ("pink", "D"),
    ("red", "v"),
    ("sky", "P"),
    ("grey", "X"),
)
HATCHES = ("", "//", "", "\\\\", "", "--", "||")  # no dots: each would be a path of its own


def make_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI)


def make_axes(fig: Any, *, left: float, right: float, top: float, bottom: float) -> Any:
    """One pair of axes, with margins in pixels."""
    width, height = fig.get_size_inches() * DPI
    return fig.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))


def plan_title(plan: Plan) -> str:
    return f"plan {plan.name}, " + ("every step computed" if plan.cache == "none" else f"cache {plan.cache}")


# --- the strip ------------------------------------------------------------------------------------------------------


def plot_plan_strip(palette: Palette, width: float, plan: Plan, rows: Sequence[StripRow]) -> Any:
    """A line of cells for each row; a cell is an evaluation, and its height says its action as its colour does."""
    shown, tall, label, top, bottom = rows[:MAX_STRIP_ROWS], 22, 17, 6, 36
    fig = make_figure(width, top + len(shown) * (tall + label) + bottom)
    ax = make_axes(fig, left=2, right=2, top=top, bottom=bottom)
    count = len(plan.evaluations)
    ax.set(xlim=(-0.5, count - 0.5), ylim=(len(shown) * (tall + label), 0), yticks=[])
    for i, row in enumerate(shown):
        y = i * (tall + label)
        ax.text(-0.5, y + 12, shorten_text(row.label, int(width / 6.6)), fontsize=10.5, color=palette["muted"])
        for action, (color, height) in ACTION_STYLES.items():
            at = [e for e, taken in enumerate(row.actions) if taken == action]
            ax.bar(at, -tall * height, 0.84, bottom=y + label + tall, color=palette[color], linewidth=0)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, pad=2)
    steps = [e.step + 1 for e in plan.evaluations]
    firsts = [e for e in range(count) if e == 0 or steps[e] != steps[e - 1]]
    every = max(1, math.ceil(len(firsts) * 26 / width))
    ticks = [e for e in firsts if steps[e] == 1 or steps[e] % every == 0]
    ax.set_xticks(ticks, [str(steps[e]) for e in ticks])
    ax.set_xlabel("step" if len(firsts) == count else "step (of more than one evaluation)", fontsize=10.5, labelpad=3)
    return fig


def strip_text(plan: Plan, rows: Sequence[StripRow]) -> str:
    """The strip in words."""
    lines = []
    for row in rows[:MAX_STRIP_ROWS]:
        counts = [f"{n} {ACTION_WORDS[a]}" for a in ACTION_STYLES if (n := row.actions.count(a))]
        lines.append(f"{row.label}: {', '.join(counts)}")
    return f"Strip of {plan_title(plan)}, {len(plan.evaluations)} evaluations. " + "; ".join(lines) + "."


def shorten_text(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-most + 1 :]


# --- error per step -------------------------------------------------------------------------------------------------


def plot_errors(
    palette: Palette,
    width: float,
    plans: Sequence[tuple[Plan, PlanFigures]],
    whole: frozenset[str],
) -> Any:
    """The largest error of each evaluation over the pictures, on a log axis; marks are hollow where not everything was computed. Beside them
    what eager bfloat16 loses, where that was measured."""
    columns = 1 if width < 500 else 3
    loss = next((f.compiled_error.bfloat16_per_evaluation for _, f in plans if f.compiled_error), ())
    top = 30 + 16 * math.ceil((len(plans) + bool(loss)) / columns)
    fig = make_figure(width, top + 210)
    ax = make_axes(fig, left=46, right=8, top=top, bottom=40)
    values = []
    for (plan, figures), (color, marker) in zip(plans, SERIES_STYLES, strict=False):
        assert figures.relative_error is not None
        compared = {e: y for e, y in enumerate(figures.relative_error.max_per_evaluation) if y is not None}
        values += compared.values()
        style = {"marker": marker, "ms": 5, "color": palette[color]}
        ax.plot(
            [e + 1 for e in compared],
            list(compared.values()),
            **style,
            lw=1.4,
            label=plan_title(plan).removeprefix("plan "),
        )
        hollow = [e for e in compared if plan.evaluations[e].variant not in whole]
        ax.plot([e + 1 for e in hollow], [compared[e] for e in hollow], **style, ls="none", mfc=palette["card"])
    if loss:
        at = [e + 1 for e in range(len(loss))]
        ax.plot(at, loss, color=palette["red"], lw=1.2, ls=(0, (5, 4)), label="what eager bfloat16 loses")
    if all(0 < v < math.inf for v in values):
        set_log_axis(ax)
    ax.grid(axis="y")
    ax.set_xlabel("evaluation", fontsize=10.5)
    set_integer_ticks(ax, max((len(f.evaluations) for _, f in plans), default=1), width)
    add_legend(ax, columns, "relative error")
    return fig


def set_log_axis(ax: Any) -> None:
    """Makes the y axis logarithmic, with plain numbers at the ticks: 0.01, 0.02, 0.05."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1e-4 else f"{value:.0e}"))


def add_legend(ax: Any, columns: int, title: str | None = None) -> None:
    """Puts a legend above the axes, where it hides nothing; none where nothing has a name."""
    if not ax.get_legend_handles_labels()[1]:
        return
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.3, "borderpad": 0.1}
    rows = {"ncols": columns, "handlelength": 1.7, "columnspacing": 1.3, "labelspacing": 0.25}
    ax.legend(**place, **rows, title=title, alignment="left")


def set_integer_ticks(ax: Any, count: int, width: float) -> None:
    every = max(1, math.ceil(count * 26 / width))
    every = next(n for n in (1, 2, 4, 5, 10, 20, 50, 100, 200, 500, every) if n >= every)
    ax.set_xticks([1, *range(every, count + 1, every)] if every > 1 else range(1, count + 1))
    ax.set_xlim(0.3, count + 0.7)


# --- times ----------------------------------------------------------------------------------------------------------


def plot_step_times(
    palette: Palette, width: float, plans: Sequence[Plan], whole: frozenset[str], times: ReportTimes
) -> Any:
    """A panel for each plan: the median time of each evaluation, and its quartiles as a line. Blue where everything was computed."""
    top, panel, bottom = 4, 118, 38
    fig = make_figure(width, top + panel * len(plans) + bottom)
    height = fig.get_size_inches()[1] * DPI
    tallest = max(quartiles(s)[2] for p in plans for s in zip(*times.plans[p.name].evaluations_ms, strict=True))
    for i, plan in enumerate(plans):
        up = top + panel * i
        area = (46 / width, (height - up - panel + 4) / height, 1 - 54 / width, (panel - 30) / height)
        ax = fig.add_axes(area)
        samples = list(zip(*times.plans[plan.name].evaluations_ms, strict=True))
        low, middle, high = zip(*(quartiles(s) for s in samples), strict=True)
        xs = range(1, len(samples) + 1)
        colors = [palette["blue" if e.variant in whole else "orange"] for e in plan.evaluations]
        spread = ([m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)])
        ax.bar(xs, middle, 0.8, color=colors, yerr=spread, ecolor=palette["ink"], error_kw={"lw": 0.9}, linewidth=0)
        ax.set_ylim(0, tallest * 1.05)
        ax.set_title(f"plan {plan.name}, milliseconds", pad=6)
        ax.grid(axis="y")
        set_integer_ticks(ax, len(samples), width)
        if i + 1 < len(plans):
            ax.set_xticklabels([])
        else:
            ax.set_xlabel("evaluation", fontsize=10.5)
    return fig


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [*samples] * 3
    return low, middle, high


def stage_names(times: ReportTimes) -> list[str]:
    """The stages in the order in which a call comes to them."""
    names = list(dict.fromkeys(n for t in times.plans.values() for s in t.stages_ms for n in s))
    return sorted(names, key=lambda n: (n == REST_STAGE, n == "vae_decoder", n == DENOISER_STAGE))


def plot_stage_times(palette: Palette, width: float, plans: Sequence[Plan], times: ReportTimes) -> Any:
    """A bar for each plan: median milliseconds of the stages of a picture, one after the other."""
    rows = {
        plan_title(p): {
            stage.replace("_", " "): statistics.median(s.get(stage, 0.0) for s in times.plans[p.name].stages_ms)
            for stage in stage_names(times)
        }
        for p in plans
    }
    return plot_stacked_bars(palette, width, rows, "ms")


# --- cost -----------------------------------------------------------------------------------------------------------


def picture_gflops(manifest: Manifest, plans: Sequence[Plan]) -> dict[str, dict[str, float]]:
    """Bar -> class of operator -> GFLOPs of one picture: the denoiser with each plan, and what is around it."""
    named = {graph.name: graph for graph in manifest.graphs}
    found = {}
    for plan in plans:
        bar: dict[str, float] = {}
        for e in plan.evaluations:
            for of in [call.of for call in e.calls] or [0]:
                for name, n in named[graph_name(e.variant, of)].cost.flops_by_class.items():
                    bar[name] = bar.get(name, 0.0) + n / 1e9
        found[f"denoiser, plan {plan.name}"] = bar
    around = [g for g in manifest.graphs if g.name in ("text_encoder", "vae_encoder", "vae_decoder")]
    found |= {g.name.replace("_", " "): {n: f / 1e9 for n, f in g.cost.flops_by_class.items()} for g in around}
    return found


def format_three_digits(value: float) -> str:
    """`3,210`, `32.1`, `0.321`: three of them at least, and never an exponent for what people write out."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def plot_stacked_bars(palette: Palette, width: float, rows: Mapping[str, Mapping[str, float]], unit: str) -> Any:
    """A bar for each row, made of its parts, and its name above it. Parts have hatches besides colours."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    columns = max(1, int(width / 165))
    top, tall, label, bottom = 8 + 17 * math.ceil(len(parts) / columns), 22, 19, 4
    fig = make_figure(width, top + len(rows) * (tall + label) + bottom)
    ax = make_axes(fig, left=2, right=2, top=top, bottom=bottom)
    longest = max((sum(row.values()) for row in rows.values()), default=0) or 1
    ax.set(xlim=(0, longest), ylim=(len(rows) * (tall + label), 0), xticks=[], yticks=[])
    for i, (name, row) in enumerate(rows.items()):
        y, x = i * (tall + label), 0.0
        total = sum(row.values())
        ax.text(0, y + 13, shorten_text(name, int(width / 8.5)), fontsize=10.5)
        ax.text(
            longest, y + 13, f"{format_three_digits(total)} {unit}", fontsize=10.5, ha="right", color=palette["muted"]
        )
        for k, part in enumerate(parts):
            (color, _), hatch = SERIES_STYLES[k % len(SERIES_STYLES)], HATCHES[k % len(HATCHES)]
            style = {"facecolor": palette[color], "edgecolor": palette["card"], "hatch": hatch, "lw": 1}
            size = row.get(part, 0.0)
            ax.barh(y + label + tall / 2, size, tall, left=x, label=part if i == 0 else None, **style)
            x += size
    ax.spines[:].set_visible(False)
    add_legend(ax, columns)
    return fig
