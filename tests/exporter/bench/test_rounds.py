"""Bench: ratios are given where times can be told apart and nowhere else, rows take turns, and fresh processes are fresh."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prebake.exporter.bench import report as bench_report
from prebake.exporter.bench import rounds as bench
from prebake.exporter.bench.cold_start import STAGES, ColdStart, measure_cold_start
from prebake.exporter.bench.report import (
    INDISTINGUISHABLE,
    describe_bench,
    interquartile_range,
    paired_speedup,
    print_bench,
    reference_times,
    sample_figures,
)
from prebake.exporter.bench.rounds import (
    BASELINES,
    BenchOptions,
    BenchResult,
    BenchRow,
    BenchSubject,
    RowTimes,
    artifact_rows,
    artifact_start,
    check_comparable,
    folder_labels,
    time_module_calls,
    time_rows,
)
from prebake.exporter.cli import bench as cli_bench
from prebake.exporter.cli import main as cli
from prebake.exporter.progress import Progress
from prebake.runtime import ArtifactError, ExportError, RecipeError
from prebake.runtime.manifest import read_manifest
from support import attach_pipelines as attached

QUIET = [1.00, 1.02, 0.98, 1.01, 0.99, 1.00, 1.00]
NOISY = [1.0, 2.0, 1.5, 1.1, 1.9, 1.4, 1.6]


def row(name: str, steps: int = 4, baseline: str | None = None) -> BenchRow:
    return BenchRow(name, steps, baseline, {}, 0.5, lambda prompt, seed: 1.0, lambda prompt, seed: (("full", 1.0),))


def timed(name: str, image_s: list[float], steps: int = 4, baseline: str | None = None) -> RowTimes:
    """A row whose denoiser takes half of each picture, in two evaluations."""
    calls = [(("full", 300 * s), ("reuse", 200 * s)) for s in image_s]
    return RowTimes(row(name, steps, baseline), 3.0, list(image_s), list(calls))


# --- figures, on made-up times --------------------------------------------------------------------------------------


def test_interquartile_range_is_the_distance_of_the_quartiles():
    assert interquartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert interquartile_range([5.0, 1.0]) == 2.0
    assert interquartile_range([1.0, 1.0, 1.0, 1.0, 1000.0]) == 0.0  # an outlier is not the spread
    assert sample_figures([7.0]) == {
        "median": 7.0,
        "interquartile_range": None,
        "samples": [7.0],
    }  # nor is there one of one


def test_the_ratio_is_the_median_of_the_rounds_own_ratios():
    """Where the machine slows down for a while, it slows down both sides of a round."""
    own = [1.0, 1.1, 4.0, 1.2, 1.3]
    base = [2 * s for s in own]
    assert paired_speedup(base, own).value == 2.0
    other = [2.0, 2.0, 2.0, 2.0, 6.0]
    assert paired_speedup([6.0, 6.0, 8.0, 8.0, 12.0], other).value == 3.0  # of the medians it would be 4


def test_a_difference_smaller_than_the_spread_has_no_ratio():
    shifted = [s + 0.1 for s in NOISY]
    for base, own in ((NOISY, shifted), (shifted, NOISY), (NOISY, NOISY)):
        found = paired_speedup(base, own)
        assert found.value is None
        assert found.reason is not None
        assert "interquartile range" in found.reason


def test_canary_the_same_difference_has_one_where_times_are_quiet():
    shifted = [s + 0.1 for s in QUIET]
    assert paired_speedup(shifted, QUIET).value == pytest.approx(1.1)
    assert paired_speedup(NOISY, [s / 4 for s in NOISY]).value == 4.0


def test_the_noise_of_either_side_counts():
    assert paired_speedup(QUIET, [s + 0.2 for s in NOISY]).value is not None  # 0.7 apart, spread 0.5
    assert paired_speedup([s + 0.4 for s in QUIET], NOISY).value is None  # 0.1 apart, and only the other one is noisy
    assert paired_speedup(NOISY, [s + 0.4 for s in QUIET]).value is None


def test_ratios_are_against_eager_of_as_many_steps_else_against_the_first_row():
    rows = [timed("a", QUIET, 4), timed("b", QUIET, 8)]
    assert reference_times(rows, rows[1]) is rows[0]
    rows += [
        timed("compile", QUIET, 4, "compile"),
        timed("eager", QUIET, 4, "eager"),
        timed("eager", QUIET, 8, "eager"),
    ]
    assert [reference_times(rows, t).row.steps for t in rows] == [4, 8, 4, 4, 8]
    assert {reference_times(rows, t).row.baseline for t in rows} == {"eager"}


@pytest.fixture
def made_up(tiny_artifact) -> BenchResult:
    rows = (timed("a", QUIET), timed("b", [s / 2 for s in QUIET]), timed("c", [s + 0.001 for s in QUIET]))
    return BenchResult(read_manifest(tiny_artifact), "a red circle", BenchOptions(), rows, {})


def test_the_report_has_every_sample_and_a_reason_for_every_ratio_that_is_missing(made_up):
    described = json.loads(bench_report.format_json(describe_bench(made_up)))
    first, fast, same = described["rows"]
    assert fast["image_s"]["samples"] == [s / 2 for s in QUIET]
    assert fast["denoiser_s"]["samples"] == pytest.approx([s / 4 for s in QUIET])
    assert fast["denoiser_ms_per_step"] == pytest.approx(1e3 * 0.25 / 4)
    assert fast["evaluations_ms"]["reuse"]["median"] == pytest.approx(100.0)
    assert first["ratio"] is first["against"] is None
    assert fast["ratio"] == {
        "image": 2.0,
        "image_reason": None,
        "denoiser": pytest.approx(2.0),
        "denoiser_reason": None,
    }
    assert same["ratio"]["image"] is same["ratio"]["denoiser"] is None
    assert "interquartile range" in same["ratio"]["image_reason"]
    assert described["machine"]["torch"] == torch.__version__
    assert described["machine"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("with_rich", [True, False])
def test_the_table_says_where_times_are_not_told_apart(made_up, with_rich, monkeypatch):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    file = io.StringIO()
    print_bench(describe_bench(made_up), file)
    lines = file.getvalue().splitlines()
    image, denoiser = (line for line in lines if line.split()[:1] == ["b"])
    assert "2.00x" in image
    assert "2.00x" in denoiser
    for line in (line for line in lines if line.split()[:1] == ["c"]):
        assert INDISTINGUISHABLE in line
        assert "x " not in line.replace(INDISTINGUISHABLE, "")
    assert f"note: {INDISTINGUISHABLE}" in file.getvalue()


@pytest.mark.parametrize("with_rich", [True, False])
def test_every_table_fits_80_columns_and_no_number_is_cut(made_up, with_rich, monkeypatch):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    described = describe_bench(made_up)
    for row in described["rows"]:
        row["name"] = "an-artifact-of-a-long-name-at-1024x1024, plan 28-uncached, " + row["name"]
        row["image_s"]["median"] = row["denoiser_s"]["median"] = 1234.5678
    file = io.StringIO()
    print_bench(described, file)
    tables = [line for line in file.getvalue().splitlines() if not line.startswith("note: ")]
    assert max(map(len, tables)) <= 80
    assert file.getvalue().count("1234.5678") == 6
    assert "…" not in file.getvalue()


# --- measuring ------------------------------------------------------------------------------------------------------


def test_rows_take_turns_with_equal_seeds_after_a_warm_up():
    seen: list[tuple[str, str, int]] = []

    def watched(name: str) -> BenchRow:
        def picture(prompt: str, seed: int) -> float:
            seen.append((name, "picture", seed))
            return float(len(seen))

        def evaluations(prompt: str, seed: int) -> bench.CallTimes:
            seen.append((name, "evaluations", seed))
            return (("full", 1.0),)

        return BenchRow(name, 1, None, {}, 0.0, picture, evaluations)

    first, second = time_rows([watched("a"), watched("b")], "a red circle", 2, Progress())
    rounds = [(name, kind, seed) for seed in (0, 1) for kind in ("picture", "evaluations") for name in "ab"]
    assert seen[4:] == rounds
    assert (first.first_image_s, second.first_image_s) == (1.0, 3.0)
    assert first.image_s == [5.0, 9.0]
    assert len(first.calls) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_of_a_module_are_followed_and_no_longer_afterwards(compiled):
    module: torch.nn.Module = torch.nn.Linear(2, 2)
    called: Any = torch.compile(module, backend="eager") if compiled else module
    with time_module_calls(called) as taken:
        called(torch.ones(1, 2))
        called(torch.ones(1, 2))
    called(torch.ones(1, 2))
    assert len(taken) == 2
    assert min(taken) > 0


def test_folders_of_equal_names_are_told_apart():
    assert folder_labels([Path("x/a"), Path("y/b")]) == ["a", "b"]
    assert folder_labels([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
    assert folder_labels([Path("x/a"), Path("x/a")]) == ["x/a #1", "x/a #2"]


def test_the_command_line_knows_every_baseline():
    assert tuple(BASELINES) == cli_bench.BASELINE_NAMES


def test_artifacts_that_draw_something_else_are_refused(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    other = manifest.model_copy(update={"source": manifest.source.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(RecipeError, match="same model"):
        check_comparable(Path("b"), other, Path("a"), manifest)
    larger = manifest.model_copy(update={"defaults": manifest.defaults.model_copy(update={"height": 64})})
    with pytest.raises(RecipeError, match=r"64, 32, 1"):
        check_comparable(Path("b"), larger, Path("a"), manifest)
    failed = manifest.model_copy(update={"status": "failed"})
    with pytest.raises(ArtifactError, match="verification failed"):
        check_comparable(Path("a"), failed, Path("a"), failed)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "5"], "has the plans 8, 8-uncached"),
        (["--model", "shapes"], "add --baseline"),
        (["--baseline", "eager"], "add --model FOLDER"),
    ],
)
def test_choices_that_do_not_fit_are_refused_before_anything_runs(tiny_artifact, arguments, sentence, capsys):
    assert cli.main(["bench", str(tiny_artifact), *arguments, "--quiet"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--runs", "1"], ["--baseline", "eager,tensorflow"]])
def test_arguments_that_make_no_sense_are_refused_by_the_parser(arguments):
    with pytest.raises(SystemExit) as refused:
        cli.main(["bench", "x", *arguments])
    assert refused.value.code == 2


# --- on an artifact -------------------------------------------------------------------------------------------------


def test_every_plan_and_baseline_is_a_row(tiny_artifact, tiny_folder, tmp_path, capsys):
    report = tmp_path / "bench.json"
    arguments = ["--runs", "2", "--no-cold", "--json", "--baseline", "eager-bf16,eager", "--model", str(tiny_folder)]
    assert cli.main(["bench", str(tiny_artifact), *arguments, "--output", str(report)]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described == json.loads(report.read_text("utf-8"))
    assert [r["name"] for r in described["rows"]] == [
        "tiny, plan 8",
        "tiny, plan 8-uncached",
        "eager-bf16, 8 steps",
        "eager, 8 steps",
    ]
    assert [r["against"] for r in described["rows"]] == ["eager, 8 steps"] * 3 + [None]
    cached, uncached, half, eager = described["rows"]
    for r in described["rows"]:
        assert len(r["image_s"]["samples"]) == len(r["denoiser_s"]["samples"]) == 2
        assert min(r["denoiser_s"]["samples"]) > 0
        assert r["load_s"] > 0
        assert r["first_image_s"] > 0
    assert (half["dtype"], eager["dtype"]) == ("bfloat16", "float32")
    assert len(eager["evaluations_ms"]["denoiser"]["samples"]) == 2 * 8
    assert len(uncached["evaluations_ms"]["full"]["samples"]) == 2 * 8
    assert set(cached["evaluations_ms"]) > {"full"}
    assert sum(len(v["samples"]) for v in cached["evaluations_ms"].values()) == 2 * 8
    assert described["cold"] == []


def test_a_compiled_denoiser_draws_and_the_pipeline_keeps_its_own(tiny_artifact, tiny_folder, monkeypatch):
    """With a stand-in for torch.compile, which takes too long for here."""
    compiled: list[torch.nn.Module] = []

    def compile_(module: torch.nn.Module) -> torch.nn.Module:
        compiled.append(module)
        return Wrapped(module)

    monkeypatch.setattr(torch, "compile", compile_)
    choices = BenchOptions(("compile", "eager"), steps=8, model=str(tiny_folder))
    subjects = bench.read_subjects([tiny_artifact], choices)
    fast, eager = bench.baseline_rows(subjects, choices, Progress())
    assert len(fast.evaluations("a red circle", 0)) == 8
    (module,) = compiled
    assert Wrapped.calls == 8
    eager.picture("a red circle", 0)
    assert Wrapped.calls == 8
    assert type(module).__name__ == "FluxTransformer2DModel"


class Wrapped(torch.nn.Module):
    """In place of what torch.compile returns: counts, and passes on."""

    calls = 0

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs):
        Wrapped.calls += 1
        return self.module(*args, **kwargs)


def test_a_cold_start_is_that_of_a_fresh_process(tiny_artifact):
    choices = BenchOptions(steps=8)
    (subject,) = bench.read_subjects([tiny_artifact], choices)
    found = measure_cold_start(artifact_start(subject, "a red circle"))
    assert tuple(found.seconds) == STAGES
    assert min(found.seconds.values()) > 0
    assert found.total == sum(found.seconds.values())
    assert found.second_image < found.total
    # torch alone takes more than 100 MB; this process, with diffusers and its models, must not be counted
    assert found.peak_bytes > 100e6


def test_a_baseline_starts_cold_with_diffusers(tiny_artifact, tiny_folder):
    choices = BenchOptions(("eager-bf16",), steps=8, model=str(tiny_folder))
    (subject,) = bench.read_subjects([tiny_artifact], choices)
    (start,) = bench.baseline_starts(subject, "a red circle", choices)
    found = measure_cold_start(start)
    assert tuple(found.seconds) == STAGES
    assert min(found.seconds.values()) > 0


def test_an_attached_artifact_is_timed_in_its_pipeline(tmp_path, monkeypatch):
    """Its graphs run as they were captured; only the way to them is looked at."""
    folder = attached.saved("sana", tmp_path / "sana")
    recipe = attached.recipe("sana", folder, cache={"method": "mask", "mask": "1(01)"})  # at 4 steps 1010
    (tmp_path / "artifact").mkdir()
    artifact = attached.uncompiled(recipe, tmp_path / "artifact")
    monkeypatch.setattr(bench, "open_artifact", lambda folder: artifact)
    subject = BenchSubject("sana", artifact.folder, artifact.manifest, recipe, artifact.plans, str(folder))
    assert subject.attached
    for row in artifact_rows(subject, Progress()):
        calls = row.evaluations(attached.PROMPT, 0)
        assert [name for name, _ in calls] == [e.variant for e in artifact.plans[row.facts["plan"]].evaluations]
        assert row.picture(attached.PROMPT, 0) > sum(ms for _, ms in calls) / 1e3 / 10
    start = artifact_start(subject, attached.PROMPT)
    assert (start.attached, start.pipeline, start.pipeline_class) == (True, str(folder), "SanaPipeline")


def test_the_memory_of_a_fresh_process_is_its_own():
    """`ru_maxrss` would give what the parent holds: see `cold.peak_bytes`."""
    held = bytearray(b"x" * 300_000_000)
    program = "from prebake.exporter.bench.cold_start import read_peak_bytes; print(read_peak_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 1e6 < int(done.stdout) < len(held) / 2


def test_what_a_fresh_process_refuses_is_said_as_it_is(tmp_path):
    with pytest.raises(ArtifactError, match="manifest"):
        measure_cold_start(ColdStart("x", str(tmp_path), "a red circle", 8, False, 1))
    with pytest.raises(ExportError, match="cold start of x: the process ended with code 1"):
        measure_cold_start(ColdStart("x", str(tmp_path), "a red circle", 8, False, threads=-1))


def test_without_baselines_no_diffusers_is_imported(tiny_artifact):
    program = (
        "import sys; from prebake.exporter.cli import main as cli; "
        "code = cli.main(sys.argv[1:]); "
        "print(code, sorted({n.partition('.')[0] for n in sys.modules} & {'diffusers', 'transformers'}))"
    )
    arguments = ["bench", str(tiny_artifact), "--runs", "2", "--no-cold", "--quiet"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "0 []", done.stderr


def test_cold_starts_take_turns(tiny_artifact, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(bench, "measure_cold_start", lambda start: seen.append(start.name) or len(seen))
    subjects = bench.read_subjects([tiny_artifact, tiny_artifact], BenchOptions(steps=8))
    found = bench.measure_cold_starts(subjects, "a red circle", BenchOptions(cold_runs=2), Progress())
    assert seen == [*found, *found]
    assert [len(runs) for runs in found.values()] == [2, 2]
