"""Numbers, tables and step strips as people read them; no torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .manifest import Manifest
from .plan import Plan
from .storage.weight_files import component_name

TERMINAL_COLUMNS = 80
VARIANT_SIGNS = "10abcdefghijklmnopqrstuvwxyz"  # of variants in a step strip: 1 computes everything


BLOCK_SIGNS = "█·░▒▓"  # of the first of them, in a terminal


def variant_signs(manifest: Manifest, plans: Iterable[Plan]) -> dict[str, str]:
    """Variant -> its sign in a step strip: 1 computes everything, 0 is the first that does not, then a, b, c and so on."""
    whole, graphs = manifest.whole_graphs, {graph.name for graph in manifest.graphs}
    used = list(dict.fromkeys(name for plan in plans for name in plan.variants()))
    cheaper = [n for n in used if n in graphs - whole]
    signs = dict(zip(cheaper, VARIANT_SIGNS[1:], strict=False))
    return {name: signs.get(name, "?") if name in cheaper else VARIANT_SIGNS[0] for name in used}


def block_signs(signs: Mapping[str, str], encoding: str | None) -> dict[str, str]:
    """The signs of `variant_signs` as blocks, where the terminal's encoding has them: a full one computes everything."""
    blocks = dict(zip(VARIANT_SIGNS, BLOCK_SIGNS, strict=False))
    try:
        BLOCK_SIGNS.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return dict(signs)
    return {name: blocks.get(sign, sign) for name, sign in signs.items()}


def step_strip(plan: Plan, signs: Mapping[str, str]) -> str:
    """One sign for each evaluation, e.g. `110100`."""
    return "".join(signs[evaluation.variant] for evaluation in plan.evaluations)


def folder_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes by top-level folder, and in all."""
    total: Counter[str] = Counter()
    for entry in manifest.files:
        total[entry.path.split("/")[0]] += entry.size
    return dict(sorted(total.items())) | {"total": sum(total.values())}


def weights_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes of weights by component."""
    total: Counter[str] = Counter()
    for entry in manifest.files:
        if entry.path.startswith("weights/"):
            total[component_name(entry.path)] += entry.size
    return dict(sorted(total.items()))


def weights_text(sizes: Mapping[str, int], before: Mapping[str, int]) -> str:
    """`denoiser 12GB (24GB before quantization), text_encoder 9.8GB`, of `weights_bytes` and a manifest's `unquantized_bytes`."""
    return ", ".join(
        f"{component} {format_bytes(size)}"
        + (f" ({format_bytes(before[component])} before quantization)" if component in before else "")
        for component, size in sizes.items()
    )


def align_columns(rows: Sequence[tuple[str, ...]], right: Iterable[int] = ()) -> list[str]:
    """The rows in aligned columns, two spaces between them; the columns in `right` are aligned to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    right = set(right)
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def wrap_entries(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Names in one column and their texts in the next, which are broken so that every line fits 80 columns."""
    indent = 2 + max((len(name) for name, _ in entries), default=0)
    lines = []
    for name, text in entries:
        first, *others = textwrap.wrap(text, max(TERMINAL_COLUMNS - indent, 20)) or [""]
        lines += [f"{name:<{indent}}{first}".rstrip(), *(f"{'':<{indent}}{line}" for line in others)]
    return lines


def format_count(count: float) -> str:
    """Three digits and a decimal prefix: 1.23G."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}P"


def format_bytes(count: int) -> str:
    return f"{format_count(count)}B"
