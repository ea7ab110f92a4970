"""What a bench found, as tables for people and as JSON with every raw sample for programs.

In: a `Bench` of `bench.py`. A ratio is the median of the rounds' own ratios, since the rows of one round ran side by side.
None is given where the difference of the medians is smaller than the larger of the two interquartile ranges: such a number
would say more about the machine's other work than about what is compared.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from ...runtime.errors import ArtifactError
from ..verify.report import Cells, cpu_name, number, print_cells, to_json
from .cold_start import STAGES

if TYPE_CHECKING:
    from .cold_start import Started
    from .rounds import Bench, Timed

SCHEMA_VERSION = 1
NOT_TOLD_APART = "not told apart"
PACKAGES = ("torch", "diffusers", "transformers", "torchao", "onnxruntime", "prebake")
METHOD = {
    "rounds": "every round draws one picture with each row in turn, the prompt named here, seed = round; all in one process",
    "image": "wall seconds of the whole call, prompt to picture, with nothing watched",
    "denoiser": "a second turn of the same round with the denoiser's calls on record: wall seconds of all its evaluations together",
    "warm_up": "before the rounds each row drew two pictures, one of either kind; first_image_s is the first of them, and torch.compile's compilation is in it, as far as its cache on this machine does not have it",
    "load": "seconds to open the artifact or load the pipeline in that process, libraries imported before; in both the SHA-256 of the files is checked; one sample",
    "ratio": "median over rounds of (time of the row it is against) / (time of the row); null where the medians differ by less than the larger of the two interquartile ranges",
    "cold": "fresh processes in turn, empty code caches, files in the system's cache: interpreter, import, load, first picture; torch.compile compiles in the first picture; peak_bytes is the resident peak up to it",
}


def interquartile(samples: Sequence[float]) -> float:
    """The distance of the quartiles, interpolated between the samples, of which there are two or more."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, or None and why there is no such number."""

    value: float | None
    reason: str | None = None


def ratio(base: Sequence[float], own: Sequence[float]) -> Ratio:
    """`base` / `own`, whose k-th samples are of the same round."""
    difference = abs(statistics.median(base) - statistics.median(own))
    noise = max(interquartile(base), interquartile(own))
    if difference < noise:
        return Ratio(None, f"the medians differ by {difference:.3g} s, the larger interquartile range is {noise:.3g} s")
    return Ratio(statistics.median(b / o for b, o in zip(base, own, strict=True)))


def against(timed: Sequence[Timed], t: Timed) -> Timed:
    """What a row's ratios are against: eager float32 of as many steps where it was timed, else the first row."""
    eager = (e for e in timed if e.row.baseline == "eager" and e.row.steps == t.row.steps)
    return next(eager, timed[0])


# --- as JSON --------------------------------------------------------------------------------------------------------


def describe(found: Bench) -> dict[str, Any]:
    """The bench as plain values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": found.manifest.source.model_dump(mode="json"),
        "prompt": found.prompt,
        "runs": found.choices.runs,
        "machine": machine(),
        "method": METHOD,
        "rows": [described_row(found.timed, t) for t in found.timed],
        "cold": [described_starts(name, runs) for name, runs in found.cold.items()],
    }


def described_row(timed: Sequence[Timed], t: Timed) -> dict[str, Any]:
    base = against(timed, t)
    by_graph: dict[str, list[float]] = {}
    for name, ms in (call for calls in t.calls for call in calls):
        by_graph.setdefault(name, []).append(ms)
    return {
        "name": t.row.name,
        "baseline": t.row.baseline,
        "steps": t.row.steps,
        **t.row.facts,
        "load_s": t.row.load_s,
        "first_image_s": t.first_image_s,
        "image_s": figures(t.image_s),
        "denoiser_s": figures(t.denoiser_s),
        "denoiser_ms_per_step": 1e3 * statistics.median(t.denoiser_s) / t.row.steps,
        "evaluations_ms": {name: figures(ms) for name, ms in sorted(by_graph.items())},
        "against": None if base is t else base.row.name,
        "ratio": None if base is t else ratios(base, t),
    }


def ratios(base: Timed, t: Timed) -> dict[str, Any]:
    whole, denoiser = ratio(base.image_s, t.image_s), ratio(base.denoiser_s, t.denoiser_s)
    return {
        "image": whole.value,
        "image_reason": whole.reason,
        "denoiser": denoiser.value,
        "denoiser_reason": denoiser.reason,
    }


def described_starts(name: str, runs: Sequence[Started]) -> dict[str, Any]:
    return {
        "name": name,
        **{f"{stage}_s": figures([r.seconds[stage] for r in runs]) for stage in STAGES},
        "total_s": figures([r.total for r in runs]),
        "second_image_s": figures([r.second_image for r in runs]),
        "peak_bytes": figures([r.peak_bytes for r in runs]),
    }


def figures(samples: Sequence[float]) -> dict[str, Any]:
    """One sample has no interquartile range: None."""
    return {
        "median": statistics.median(samples),
        "interquartile_range": interquartile(samples) if len(samples) > 1 else None,
        "samples": list(samples),
    }


def machine() -> dict[str, Any]:
    """What times depend on, with the versions of what is installed."""
    known: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def write(path: Path, described: Mapping[str, Any]) -> None:
    """Raises ArtifactError where the file cannot be written."""
    try:
        path.write_text(to_json(dict(described)), "utf-8")
    except OSError as e:
        raise ArtifactError(f"{path}: the report cannot be written ({e.strerror}); choose another --output") from e


# --- as tables ------------------------------------------------------------------------------------------------------


def show(described: Mapping[str, Any], file: TextIO) -> None:
    """Tables on `file`: drawn by rich where it is installed, columns of plain text where it is not."""
    if described["cold"]:
        print_cells("cold start, seconds", cold_cells(described["cold"]), file)
    where = described["machine"]
    title = f"{described['runs']} rounds in turn, {where['threads']} threads, {where['cpu']}, torch {where['torch']}"
    print_cells(title, row_cells(described["rows"]), file)
    for sentence in notes(described["rows"]):
        print(f"note: {sentence}", file=file)


def row_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """A line for each row: medians, and after each its interquartile range."""
    cells: Cells = [("", "s/image", "±", "speed", "denoiser s", "±", "speed", "ms/step", "load s", "first s")]
    for row in rows:
        image, denoiser = row["image_s"], row["denoiser_s"]
        cells.append(
            (
                row["name"],
                number(image["median"], ".4f"),
                number(image["interquartile_range"], ".4f"),
                speed(row, "image"),
                number(denoiser["median"], ".4f"),
                number(denoiser["interquartile_range"], ".4f"),
                speed(row, "denoiser"),
                number(row["denoiser_ms_per_step"], ".2f"),
                number(row["load_s"], ".2f"),
                number(row["first_image_s"], ".3f"),
            )
        )
    return cells


def speed(row: Mapping[str, Any], of: str) -> str:
    if row["ratio"] is None:
        return "1"
    return NOT_TOLD_APART if row["ratio"][of] is None else f"{row['ratio'][of]:.2f}x"


def cold_cells(starts: Sequence[Mapping[str, Any]]) -> Cells:
    cells: Cells = [("", *(stage.replace("_", " ") for stage in STAGES), "total", "±", "second image", "peak MB")]
    for start in starts:
        columns = (*(f"{stage}_s" for stage in STAGES), "total_s")
        cells.append(
            (
                start["name"],
                *(number(start[column]["median"], ".2f") for column in columns),
                number(start["total_s"]["interquartile_range"], ".2f"),
                number(start["second_image_s"]["median"], ".2f"),
                number(start["peak_bytes"]["median"] / 1e6, ".0f"),
            )
        )
    return cells


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table's reader has to know, a sentence each."""
    found = [f"speed is against {name}" for name in dict.fromkeys(row["against"] for row in rows if row["against"])]
    if len(found) > 1:
        found = ["speed is against eager of as many steps"]
    if any(NOT_TOLD_APART in (speed(row, "image"), speed(row, "denoiser")) for row in rows):
        found.append(
            f"{NOT_TOLD_APART}: the medians differ by less than the larger interquartile range (±); more --runs, or a quieter "
            "machine, may tell"
        )
    return found
