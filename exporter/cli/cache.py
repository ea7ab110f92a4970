"""`prebake cache`: what exports have kept of the graphs that they compiled."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import print_json

if TYPE_CHECKING:
    from ..export_cache.store import StoreEntry

GIB = 1 << 30


def add_cache(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "cache",
        help="list the compiled graphs that exports have kept, or remove some",
        description="Lists what is kept of compiled graphs, used last first. Exports of the same graphs take it from there. "
        "It is removed by itself where more than 4 GiB are kept.",
    )
    parser.add_argument(
        "--prune",
        type=parse_gib,
        metavar="GIB",
        help="remove what was used longest ago, until at most so many GiB are left; 0 removes all",
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="the folder (default: $XDG_CACHE_HOME/prebake/compiled)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(run=_cache)


def parse_gib(text: str) -> float:
    number = float(text)
    if not (number >= 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return number


def _cache(args: argparse.Namespace) -> int:
    from ..export_cache.store import Store, default_store_folder

    store = Store(args.cache_dir or default_store_folder())
    removed = [] if args.prune is None else store.prune(int(args.prune * GIB))
    entries = store.entries()
    if args.json:
        described = {
            "folder": str(store.folder),
            "bytes": entries_bytes(entries),
            "graphs": [entry_json(e) for e in entries],
        }
        print_json(described if args.prune is None else {**described, "removed": [entry_json(e) for e in removed]})
        return 0
    if args.prune is not None:
        print(f"removed: {len(removed)} graphs, {entries_bytes(removed) / GIB:.2f} GiB")
    print(*cache_lines(store.folder, entries), sep="\n")
    return 0


def entries_bytes(entries: list[StoreEntry]) -> int:
    return sum(entry.size for entry in entries)


def entry_json(entry: StoreEntry) -> dict[str, Any]:
    """`used_s`: seconds since 1970."""
    return {"key": entry.path.stem, "bytes": entry.size, "used_s": round(entry.used), **entry.about}


def cache_lines(folder: Path, entries: list[StoreEntry]) -> list[str]:
    """A table of the entries, and how much they are in all."""
    from ...runtime.text import align_columns

    total = f"{folder}: {len(entries)} graphs, {entries_bytes(entries) / GIB:.2f} GiB"
    if not entries:
        return [total]
    head = ("model", "graph", "backend", "MB", "compiled in", "used")
    return [*align_columns([head, *map(entry_cells, entries)], right=(3, 4, 5)), total]


def entry_cells(entry: StoreEntry) -> tuple[str, ...]:
    """The compiler's time is what a hit saves."""
    names = (str(entry.about.get(name, "?")) for name in ("model", "graph", "backend"))
    took = f"{entry.about['seconds']:.1f} s" if "seconds" in entry.about else "?"
    return (*names, f"{entry.size / 1e6:.1f}", took, f"{age_text(time.time() - entry.used)} ago")


def age_text(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
