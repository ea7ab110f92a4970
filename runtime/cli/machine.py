"""`prebake inspect --machine`: the rates of this machine that forecasts go by, as `rates/rates_file.py` keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..rates.rates_file import Rates, RateTable, list_rates, rates_folder
from ..text import align_columns, format_bytes, wrap_entries
from .streams import json_text, print_lines

NO_RATES_NOTE = "no rates in {}: `prebake export --recipe NAME --model MODEL --dry-run` measures them"


def print_rates(*, in_json: bool) -> None:
    """Prints all that is known, each kind of machine and code by itself."""
    known = list_rates()
    if in_json:
        print(json_text(rates_json(known), indent=2))
    elif known:
        print_lines(*rates_lines(known))
    else:
        print_lines(NO_RATES_NOTE.format(rates_folder()))


def rates_json(known: Mapping[Path, Rates]) -> dict[str, Any]:
    """The files as they are, each with its path."""
    files = [{"path": str(path), **rates.model_dump(mode="json")} for path, rates in known.items()]
    return {"folder": str(rates_folder()), "rates": files}


def rates_lines(known: Mapping[Path, Rates]) -> Iterator[str]:
    for i, (path, rates) in enumerate(known.items()):
        machine = rates.machine
        threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
        backend = f"{machine.backend}, isa {machine.isa}{machine.kernels and f', kernels {machine.kernels}'}"
        yield from [""] if i else []
        yield from wrap_entries(
            [
                ("machine", f"{machine.cpu}, {threads}, torch {machine.torch}"),
                ("code", backend),
                ("file", str(path)),
            ]
        )
        rows = [
            ("operator", "points", "least", "most", "GFLOP/s at"),
            *(describe_table(name, table) for name, table in rates.tables.items()),
        ]
        yield from ["", *align_columns(rows, right=(1, 2, 3))] if rates.tables else []
        yield from ["", *align_columns(list(memory_rows(rates)), right=(1,))]


def describe_table(name: str, table: RateTable) -> tuple[str, ...]:
    """The table's row: the least and the greatest rate, and where that is reached."""
    best = max(range(len(table.gflops)), key=table.gflops.__getitem__)
    at, rest = [], best
    for axis, sizes in reversed(table.axes.items()):
        rest, i = divmod(rest, len(sizes))
        at.append(f"{axis} {sizes[i]}")
    return (
        name,
        str(len(table.gflops)),
        f"{min(table.gflops):.3g}",
        f"{max(table.gflops):.3g}",
        ", ".join(reversed(at)),
    )


def memory_rows(rates: Rates) -> Iterator[tuple[str, ...]]:
    """Bandwidths by how much is moved, and what a call and a value take."""
    yield "memory", "GB/s"
    for size, rate in sorted(rates.bandwidth.items()):
        yield f"a loop that moves {format_bytes(size)}", f"{rate / 1e6:.3g}"
    for size, rate in sorted(rates.reading.items()):
        yield f"weights read, {format_bytes(size)} in all", f"{rate / 1e6:.3g}"
    if rates.call_ms is not None:
        yield "a call", f"{rates.call_ms * 1e3:.3g} us"
    if rates.value_ms is not None:
        yield "a value in a loop", f"{rates.value_ms * 1e6:.3g} ns"
    if rates.calls:
        yield "operators timed by themselves", str(len(rates.calls))
