"""Measured figures, as the pages have them: made of the benchmarks' files, and of nothing else.

    python benchmarks/tables.py            # writes them anew into every page
    python benchmarks/tables.py --check    # names the pages that say something else than the files; exit code 1

A page has them between `<!-- figures: NAME -->` and `<!-- figures: end -->`. After a benchmark has written its file with
`--output benchmarks/results/FILE.json`, the first command brings the pages up to date; a test holds them to it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import figures
import scaling_figures as scaling

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
PAGES = (
    "README.md",
    "docs/benchmarks/caches.md",
    "docs/benchmarks/cpu.md",
    "docs/benchmarks/scaling.md",
    "docs/benchmarks/serving.md",
    "docs/explanation/caches.md",
)
REGION = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- figures: end -->)", re.DOTALL)
VERIFY = f"{RESULTS}/verify-shapes.json"
SHAPES, WIDE = f"{RESULTS}/denoiser-shapes.json", f"{RESULTS}/denoiser-wide.json"
CPU, SCALING = f"{RESULTS}/cpu.json", f"{RESULTS}/scaling.json"
COLD, CONTRACT = f"{RESULTS}/cold_start.json", f"{RESULTS}/contract.json"
FIGURES: Mapping[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "headline": (figures.headline_table, (VERIFY, WIDE, CPU, COLD)),
    "verify": (figures.verify_table, (VERIFY,)),
    "denoiser": (figures.evaluations_table, (SHAPES, WIDE)),
    "reused": (figures.reuse_sentence, (WIDE,)),
    "openvino": (figures.openvino_table, (CPU,)),
    "cpu": (figures.cpu_table, (CPU,)),
    "cpu-avx2": (figures.cpu_table, (f"{RESULTS}/cpu-avx2.json",)),
    "cold-start": (figures.cold_start_table, (COLD,)),
    "contract": (figures.contract_table, (CONTRACT,)),
    "served": (figures.serving_items, (COLD, CONTRACT)),
    "memory": (figures.memory_table, (f"{RESULTS}/memory.json",)),
    "caches-shown": (figures.shown_caches_table, (f"{RESULTS}/caches-shapes.json",)),
    "caches-shapes": (figures.caches_table, (f"{RESULTS}/caches-shapes.json",)),
    "caches-shapes-sd": (figures.caches_table, (f"{RESULTS}/caches-shapes-sd.json",)),
    **{f"scaling-{name}": (partial(scaling.curve_table, name=name), (SCALING,)) for name in scaling.CURVE_UNITS},
    "scaling-powers": (scaling.powers_table, (SCALING,)),
    "scaling-balance": (scaling.balance_sentence, (SCALING,)),
}
"""Name -> what makes the text, and the files that it is given, parsed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = {page: text for page in PAGES if (text := fill_page(page)) != (ROOT / page).read_text("utf-8")}
    for page, text in stale.items():
        if not args.check:
            (ROOT / page).write_text(text, "utf-8")
        print(f"{page}: {'not as the files have it; python benchmarks/tables.py' if args.check else 'written'}")
    return 1 if stale and args.check else 0


def fill_page(page: str, root: Path = ROOT) -> str:
    """The page with what the files under `root` say between its comments. Raises KeyError for a name that FIGURES lacks."""

    def text(found: re.Match[str]) -> str:
        make, files = FIGURES[found[2]]
        return found[1] + make(*(json.loads((root / f).read_text("utf-8")) for f in files)) + found[3]

    return REGION.sub(text, (root / page).read_text("utf-8"))


if __name__ == "__main__":
    sys.exit(main())
