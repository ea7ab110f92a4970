"""From a matplotlib figure to SVG that takes the page's colours and font, and to a PNG with the light ones.

A figure is drawn with colours that stand for names; in SVG they become the CSS variables of `style.css`, which follow the
reader's light or dark theme. Blue, orange, green, and so on are Okabe and Ito's, which are told apart without colour vision
of one kind or another; no plot tells things apart by colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PNG_DPI = 144
LIGHT = {  # as :root in style.css
    "card": "#ffffff",
    "ink": "#1d2530",
    "muted": "#5d6b7c",
    "line": "#dfe4ea",
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "pink": "#cc79a7",
    "sky": "#56b4e9",
    "red": "#d55e00",
    "grey": "#9aa5b1",
}
PALETTE_MARKERS = {name: f"#0a0b{i:02x}" for i, name in enumerate(LIGHT)}
"""What stands for each in an SVG until it is a CSS variable."""

Palette = Mapping[str, str]
DrawFigure = Callable[[Palette, float], Any]
"""(colours, width in pixels) -> a matplotlib figure of 72 dots per inch."""


@contextmanager
def matplotlib_settings(palette: Palette) -> Iterator[None]:
    """Matplotlib as the page has it, whatever the user's own settings are."""
    import matplotlib
    import matplotlib.style

    ours: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "prebake",
        "text.parse_math": False,
        "font.size": 11,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": palette["muted"],
        "axes.labelcolor": palette["muted"],
        "axes.titlecolor": palette["ink"],
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "xtick.color": palette["muted"],
        "ytick.color": palette["muted"],
        "text.color": palette["ink"],
        "grid.color": palette["line"],
        "legend.frameon": False,
        "legend.fontsize": 10.5,
        "legend.labelcolor": palette["ink"],
        "hatch.linewidth": 1.0,
    }
    with matplotlib.rc_context(), matplotlib.style.context("default"):
        matplotlib.rcParams.update(ours)
        yield


def render_svg(draw: DrawFigure, width: float, name: str) -> str:
    """The figure as an `<svg>` element for a page of HTML. Its ids begin with `name`, which is unique on the page."""
    file = io.StringIO()
    with matplotlib_settings(PALETTE_MARKERS):
        draw(PALETTE_MARKERS, width).savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return inline_svg(file.getvalue(), name)


def inline_svg(text: str, name: str) -> str:
    """The element alone, with the page's colours, font and ids."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*; ?", "", text)
    for color, value in PALETTE_MARKERS.items():
        text = text.replace(value, f"var(--{color})")
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def render_png(draw: DrawFigure, width: float) -> bytes:
    """The figure as a PNG on white."""
    file = io.BytesIO()
    with matplotlib_settings(LIGHT):
        draw(LIGHT, width).savefig(file, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()
