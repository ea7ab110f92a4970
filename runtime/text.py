"""Numbers, tables and step strips as people read them; no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .manifest import Manifest
from .plan import Plan

SIGNS = "10abcdefghijklmnopqrstuvwxyz"  # of variants in a step strip: 1 computes everything


BLOCKS = "█·░▒▓"  # of the first of them, in a terminal


def letters(manifest: Manifest, plans: Iterable[Plan]) -> dict[str, str]:
    """Variant -> its sign in a step strip: 1 computes everything, 0 is the first that does not, then a, b, c and so on."""
    graphs = {graph.name: graph for graph in manifest.graphs}
    used = list(dict.fromkeys(name for plan in plans for name in plan.variants()))
    cheaper = [n for n in used if n in graphs and (graphs[n].combines or graphs[n].zeros or graphs[n].identities)]
    signs = dict(zip(cheaper, SIGNS[1:], strict=False))
    return {name: signs.get(name, "?") if name in cheaper else SIGNS[0] for name in used}


def drawn(signs: Mapping[str, str], encoding: str | None) -> dict[str, str]:
    """The signs of `letters` as blocks, where the terminal's encoding has them: a full one computes everything."""
    blocks = dict(zip(SIGNS, BLOCKS, strict=False))
    try:
        BLOCKS.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return dict(signs)
    return {name: blocks.get(sign, sign) for name, sign in signs.items()}


def strip(plan: Plan, signs: Mapping[str, str]) -> str:
    """One sign for each evaluation, e.g. `110100`."""
    return "".join(signs[evaluation.variant] for evaluation in plan.evaluations)


def sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes by top-level folder, and in all."""
    total: Counter[str] = Counter()
    for entry in manifest.files:
        total[entry.path.split("/")[0]] += entry.size
    return dict(sorted(total.items())) | {"total": sum(total.values())}


def table(rows: Sequence[tuple[str, ...]], right: Iterable[int] = ()) -> list[str]:
    """The rows in aligned columns, two spaces between them; the columns in `right` are aligned to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    right = set(right)
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def short(count: float) -> str:
    """Three digits and a decimal prefix: 1.23G."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}P"


def in_bytes(count: int) -> str:
    return f"{short(count)}B"
