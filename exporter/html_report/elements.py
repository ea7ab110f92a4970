"""What the page's words and tables are made of: tables, bars, and numbers as people read them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plots import format_three_digits, quartiles


@dataclass(frozen=True)
class HtmlTable:
    """Rows of cells under heads. `numbers` and `hashes` are columns that are set otherwise."""

    label: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    hashes: Sequence[int] = ()


def bar_table(label: str, heads: Sequence[str], rows: Iterable[tuple[Sequence[str], float]]) -> dict[str, Any]:
    """Rows of cells, each with the length of its bar: its share of all, in percent."""
    listed = list(rows)
    total = sum(value for _, value in listed) or 1
    return {
        "label": label,
        "heads": heads,
        "rows": [{"cells": cells, "percent": f"{100 * value / total:.1f}"} for cells, value in listed],
    }


class SafeMarkup(str):
    """Our own markup, which is not escaped."""

    def __html__(self) -> str:
        return self


def code_markup(sentence: str) -> str:
    """The sentence as HTML, with what is between backticks as code."""
    parts = html.escape(sentence).split("`")
    return SafeMarkup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def machine_text(said: Mapping[str, str | int]) -> str:
    """`AMD EPYC, 2 threads, torch 2.13.0+cpu`."""
    where = str(said.get("gpu") or said.get("cpu", "a machine"))
    threads = said.get("threads", "?")
    return f"{where}, {threads} thread{'' if threads == 1 else 's'}, torch {said.get('torch', '?')}"


def seconds_text(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def spread_text(samples: Sequence[float]) -> str:
    """The median of milliseconds, and half the distance of the quartiles."""
    low, middle, high = quartiles(samples)
    half = (high - low) / 2
    return f"{format_three_digits(middle)} ± {format_three_digits(half) if half >= 100 else f'{half:.2g}'}"
