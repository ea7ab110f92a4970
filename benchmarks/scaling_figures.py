"""Markdown of `scaling.py`'s figures: a table for each curve, and by which power each quantity grows along it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from figures import Figures, format_ms, markdown_table, median_ratio

SCALING_WAYS = {"eager float32": "eager float32", "eager bfloat16": "eager bfloat16", "prebake": "**prebake**, int8"}
CURVE_UNITS = {
    "tokens": "tokens",
    "blocks": "blocks (a third of them double)",
    "prompts": "prompts",
    "threads": "threads, of the CPU's cores",
}
Quantity = tuple[list[float], list[float]]
"""Where on the curve, and how much there."""


def curve_table(found: Figures, name: str) -> str:
    """Seconds of one evaluation; MiB with the weights; seconds of an export, where it was measured."""
    points = found["curves"][name]
    extra = [quantity for quantity in ("bytes", "export") if has_quantity(points, quantity)]
    head = [name, *(SCALING_WAYS.values()), "bfloat16 / prebake"]
    head += [f"MiB: {way}" for way in SCALING_WAYS if "bytes" in extra] + ["export"] * ("export" in extra)
    rows = []
    for point in points:
        ways = [point["ways"][way] for way in SCALING_WAYS]
        times = [format_ms(statistics.median(way["seconds"])) for way in ways]
        gain = median_ratio(point["ways"]["eager bfloat16"]["seconds"], point["ways"]["prebake"]["seconds"])
        memory = [f"{way['bytes'] / 2**20:,.0f}" for way in ways if "bytes" in extra]
        export = [f"{point['export_s']:.1f} s"] if "export" in extra else []
        rows.append([f"{point['at']:,}", *times, f"{gain:.2f}x", *memory, *export])
    return markdown_table(head, rows)


def has_quantity(points: Sequence[Any], quantity: str) -> bool:
    point = points[0]
    return "export_s" in point if quantity == "export" else quantity in point["ways"]["prebake"]


def quantity_points(points: Sequence[Any], quantity: str, way: str) -> Quantity:
    """A curve's `seconds`, `bytes` or `export`, which prebake alone has."""
    values = {
        "seconds": lambda point: statistics.median(point["ways"][way]["seconds"]),
        "bytes": lambda point: point["ways"][way]["bytes"],
        "export": lambda point: point["export_s"],
    }[quantity]
    return [point["at"] for point in points], [values(point) for point in points]


def powers_table(found: Figures) -> str:
    """The exponent between the first two points of each curve, and between the last two."""
    shown = {"seconds": "time", "bytes": "memory", "export": "export"}
    rows = []
    for name in CURVE_UNITS:
        points = found["curves"][name]
        for quantity, said in shown.items():
            if quantity == "seconds" or has_quantity(points, quantity):
                ways = [way if quantity != "export" or way == "prebake" else "" for way in SCALING_WAYS]
                rows.append(
                    [
                        f"{said} by {name}",
                        *(way and end_exponents(*quantity_points(points, quantity, way)) for way in ways),
                    ]
                )
    return markdown_table(["exponent", *SCALING_WAYS.values()], rows)


def end_exponents(at: Sequence[float], values: Sequence[float]) -> str:
    first, last = fit_exponent(at[:2], values[:2]), fit_exponent(at[-2:], values[-2:])
    return f"{first:.2f}" if len(at) == 2 else f"{first:.2f} → {last:.2f}"


def fit_exponent(at: Sequence[float], values: Sequence[float]) -> float:
    """p of values ~ at^p: the slope of the line through their logarithms, by least squares."""
    return statistics.linear_regression([math.log(x) for x in at], [math.log(y) for y in values]).slope


def balance_sentence(found: Figures) -> str:
    """At how many tokens what is quadratic in them takes as long as what is linear."""
    points = found["curves"]["tokens"]
    tokens = {way: fit_quadratic(*quantity_points(points, "seconds", way)) for way in SCALING_WAYS}
    said = [f"{linear / quadratic:,.0f} ({way})" for way, (linear, quadratic) in tokens.items()]
    return f"By that fit the quadratic part is as large as the linear one at {', '.join(said)} tokens.\n"


def fit_quadratic(at: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """b and c of values ~ b x + c x^2, by least squares of relative errors."""
    x = [a / v for a, v in zip(at, values, strict=True)]
    y = [a**2 / v for a, v in zip(at, values, strict=True)]
    xx, xy, yy = (sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((x, x), (x, y), (y, y)))
    area = xx * yy - xy**2
    return (yy * sum(x) - xy * sum(y)) / area, (xx * sum(y) - xy * sum(x)) / area
