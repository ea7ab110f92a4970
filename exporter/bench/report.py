"""What a bench found, as tables for people and as JSON with every raw sample for programs.

In: a `BenchResult` of `bench.py`. A ratio is the median of the rounds' own ratios, since the rows of one round ran side by side.
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

from ...runtime.check.machine import cpu_name
from ...runtime.errors import ArtifactError
from ..verify.report import format_json
from ..verify.text_table import Cells, format_number, print_cells
from .cold_start import STAGES

if TYPE_CHECKING:
    from .cold_start import StartTimes
    from .rounds import BenchResult, RowTimes

SCHEMA_VERSION = 1
INDISTINGUISHABLE = "not told apart"
REPORTED_PACKAGES = ("torch", "diffusers", "transformers", "torchao", "onnxruntime", "prebake")
BENCH_METHOD_NOTES = {
    "rounds": "every round draws one picture with each row in turn, the prompt named here, seed = round; all in one process",
    "image": "wall seconds of the whole call, prompt to picture, with nothing watched",
    "denoiser": "a second turn of the same round with the denoiser's calls on record: wall seconds of all its evaluations together",
    "warm_up": "before the rounds each row drew two pictures, one of either kind; first_image_s is the first of them, and torch.compile's compilation is in it, as far as its cache on this machine does not have it",
    "load": "seconds to open the artifact or load the pipeline in that process, libraries imported before; in both the SHA-256 of the files is checked; one sample",
    "ratio": "median over rounds of (time of the row it is against) / (time of the row); null where the medians differ by less than the larger of the two interquartile ranges",
    "cold": "fresh processes in turn, empty code caches, files in the system's cache: interpreter, import, load, first picture; torch.compile compiles in the first picture; peak_bytes is the resident peak up to it",
}


def interquartile_range(samples: Sequence[float]) -> float:
    """The distance of the quartiles, interpolated between the samples, of which there are two or more."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


@dataclass(frozen=True)
class Speedup:
    """How many times as fast, or None and why there is no such number."""

    value: float | None
    reason: str | None = None


def paired_speedup(base: Sequence[float], own: Sequence[float]) -> Speedup:
    """`base` / `own`, whose k-th samples are of the same round."""
    difference = abs(statistics.median(base) - statistics.median(own))
    noise = max(interquartile_range(base), interquartile_range(own))
    if difference < noise:
        return Speedup(
            None, f"the medians differ by {difference:.3g} s, the larger interquartile range is {noise:.3g} s"
        )
    return Speedup(statistics.median(b / o for b, o in zip(base, own, strict=True)))


def reference_times(timed: Sequence[RowTimes], t: RowTimes) -> RowTimes:
    """The row that a row's ratios are against: eager float32 of as many steps where it was timed, else the first."""
    eager = (e for e in timed if e.row.baseline == "eager" and e.row.steps == t.row.steps)
    return next(eager, timed[0])


# --- as JSON --------------------------------------------------------------------------------------------------------


def describe_bench(found: BenchResult) -> dict[str, Any]:
    """The bench as plain values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": found.manifest.source.model_dump(mode="json"),
        "prompt": found.prompt,
        "runs": found.choices.runs,
        "machine": bench_machine_facts(),
        "method": BENCH_METHOD_NOTES,
        "rows": [describe_row(found.timed, t) for t in found.timed],
        "cold": [describe_starts(name, runs) for name, runs in found.cold.items()],
    }


def describe_row(timed: Sequence[RowTimes], t: RowTimes) -> dict[str, Any]:
    base = reference_times(timed, t)
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
        "image_s": sample_figures(t.image_s),
        "denoiser_s": sample_figures(t.denoiser_s),
        "denoiser_ms_per_step": 1e3 * statistics.median(t.denoiser_s) / t.row.steps,
        "evaluations_ms": {name: sample_figures(ms) for name, ms in sorted(by_graph.items())},
        "against": None if base is t else base.row.name,
        "ratio": None if base is t else row_speedups(base, t),
    }


def row_speedups(base: RowTimes, t: RowTimes) -> dict[str, Any]:
    whole, denoiser = paired_speedup(base.image_s, t.image_s), paired_speedup(base.denoiser_s, t.denoiser_s)
    return {
        "image": whole.value,
        "image_reason": whole.reason,
        "denoiser": denoiser.value,
        "denoiser_reason": denoiser.reason,
    }


def describe_starts(name: str, runs: Sequence[StartTimes]) -> dict[str, Any]:
    return {
        "name": name,
        **{f"{stage}_s": sample_figures([r.seconds[stage] for r in runs]) for stage in STAGES},
        "total_s": sample_figures([r.total for r in runs]),
        "second_image_s": sample_figures([r.second_image for r in runs]),
        "peak_bytes": sample_figures([r.peak_bytes for r in runs]),
    }


def sample_figures(samples: Sequence[float]) -> dict[str, Any]:
    """Median, interquartile range and samples; the range of one sample is None."""
    return {
        "median": statistics.median(samples),
        "interquartile_range": interquartile_range(samples) if len(samples) > 1 else None,
        "samples": list(samples),
    }


def bench_machine_facts() -> dict[str, Any]:
    """What times depend on, with the versions of what is installed."""
    known: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for name in REPORTED_PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def write_bench_report(path: Path, described: Mapping[str, Any]) -> None:
    """Raises ArtifactError where the file cannot be written."""
    try:
        path.write_text(format_json(dict(described)), "utf-8")
    except OSError as e:
        raise ArtifactError(f"{path}: the report cannot be written ({e.strerror}); choose another --output") from e


# --- as tables ------------------------------------------------------------------------------------------------------


def print_bench(described: Mapping[str, Any], file: TextIO) -> None:
    """Tables on `file`: drawn by rich where it is installed, columns of plain text where it is not."""
    if described["cold"]:
        print_cells("cold start, seconds", start_cells(described["cold"]), file)
    where = described["machine"]
    print(f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}", file=file)
    print_cells(f"whole pictures, {described['runs']} rounds in turn", picture_cells(described["rows"]), file)
    print_cells("the denoiser alone, in the same rounds", denoiser_cells(described["rows"]), file)
    for sentence in reading_notes(described["rows"]):
        print(f"note: {sentence}", file=file)


def picture_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """A line for each row: the whole call, its median and interquartile range, and what comes before the second picture."""
    cells: Cells = [("", "s/image", "±", "speed", "load s", "first s")]
    for row in rows:
        image = row["image_s"]
        cells.append(
            (
                row["name"],
                format_number(image["median"], ".4f"),
                format_number(image["interquartile_range"], ".4f"),
                speedup_cell(row, "image"),
                format_number(row["load_s"], ".2f"),
                format_number(row["first_image_s"], ".3f"),
            )
        )
    return cells


def denoiser_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """A line for each row: all evaluations of a picture together, and one step."""
    cells: Cells = [("", "denoiser s", "±", "speed", "ms/step")]
    for row in rows:
        denoiser = row["denoiser_s"]
        cells.append(
            (
                row["name"],
                format_number(denoiser["median"], ".4f"),
                format_number(denoiser["interquartile_range"], ".4f"),
                speedup_cell(row, "denoiser"),
                format_number(row["denoiser_ms_per_step"], ".2f"),
            )
        )
    return cells


def speedup_cell(row: Mapping[str, Any], of: str) -> str:
    if row["ratio"] is None:
        return "1"
    return INDISTINGUISHABLE if row["ratio"][of] is None else f"{row['ratio'][of]:.2f}x"


def start_cells(starts: Sequence[Mapping[str, Any]]) -> Cells:
    cells: Cells = [("", *(stage.partition("_")[0] for stage in STAGES), "total", "±", "second", "peak MB")]
    for start in starts:
        columns = (*(f"{stage}_s" for stage in STAGES), "total_s")
        cells.append(
            (
                start["name"],
                *(format_number(start[column]["median"], ".2f") for column in columns),
                format_number(start["total_s"]["interquartile_range"], ".2f"),
                format_number(start["second_image_s"]["median"], ".2f"),
                format_number(start["peak_bytes"]["median"] / 1e6, ".0f"),
            )
        )
    return cells


def reading_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences that the table's reader needs to know."""
    found = [f"speed is against {name}" for name in dict.fromkeys(row["against"] for row in rows if row["against"])]
    if len(found) > 1:
        found = ["speed is against eager of as many steps"]
    if any(INDISTINGUISHABLE in (speedup_cell(row, "image"), speedup_cell(row, "denoiser")) for row in rows):
        found.append(
            f"{INDISTINGUISHABLE}: the medians differ by less than the larger interquartile range (±); more --runs, or a quieter "
            "machine, may tell"
        )
    return found
