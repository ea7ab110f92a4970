"""Figures of plans come from the report, and only from one that is about this artifact."""

from __future__ import annotations

import json

import pytest

from prebake.runtime import load
from prebake.runtime.figures import finite_number
from prebake.runtime.pipeline import ImageOutput, ImagePipeline, VideoOutput

REPORT = {
    "model": {"sha256": ""},
    "plans": {
        "4": {
            "evaluations": ["full", "reuse", "full", "reuse"],
            "pictures": {"psnr_db": 41.5, "psnr_db_min": 38.25},
            "relative_error": {"max": 0.01},
            "speedup": 3.5,
            "image_s": 0.25,
        }
    },
}


@pytest.fixture
def reported(artifact_copy, cache_dir):
    """The toy pipeline, beside a report that a function writes."""
    pipe = load(artifact_copy, cache_dir=cache_dir)

    def write(text: str | None = None, path: str = "reports/verify.json", **changes) -> None:
        report = {**REPORT, "model": {"sha256": pipe.artifact.manifest.source.sha256}, **changes}
        (artifact_copy / path).parent.mkdir(parents=True, exist_ok=True)
        (artifact_copy / path).write_text(json.dumps(report) if text is None else text)

    return pipe, write


def test_a_report_gives_loss_and_speed(reported):
    pipe, write = reported
    assert pipe.plans["4"].psnr_db is None
    write()
    plan = pipe.plans["4"]
    assert (plan.psnr_db, plan.worst_psnr_db, plan.relative_error, plan.speed) == (41.5, 38.25, 0.01, 3.5)
    assert (plan.steps, plan.evaluations, plan.computed) == (4, 4, 2)
    assert pipe.plans["4-uncached"].psnr_db is None


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "{"},
        {"text": "[]"},
        {"text": "[" * 100_000},
        {"model": {"sha256": "of others"}},
        {"plans": {"4": {**REPORT["plans"]["4"], "evaluations": ["full"] * 4}}},
        {"plans": {"4": 7}},
    ],
)
def test_another_report_says_nothing(reported, changes):
    pipe, write = reported
    write(**changes)
    assert pipe.plans["4"].psnr_db is None


def test_a_plan_that_was_added_has_a_report_of_its_own(reported):
    pipe, write = reported
    write(path="reports/plan-4/verify.json")
    assert pipe.plans["4"].speed == 3.5


def test_the_pipe_says_what_it_is(reported):
    pipe, write = reported
    write()
    assert isinstance(pipe, ImagePipeline)
    assert (pipe.steps, pipe.sizes, pipe.family, pipe.device.type) == ((4,), ((8, 8),), "flux", "cpu")
    first, cached, uncached = repr(pipe).splitlines()
    assert first == f"ImagePipeline {pipe.artifact.folder}: flux on cpu, 8 x 8, {pipe.artifact.manifest.status}"
    assert "2 of 4 evaluations computed" in cached
    assert "41.5 dB" in cached
    assert "3.50x eager" in cached
    assert "dB" not in uncached


def test_numbers_that_are_none_count_for_nothing():
    said = {"a": "nan", "b": {"c": True}, "d": float("inf"), "e": 1}
    assert [finite_number(said, *keys) for keys in ("a", "bc", "d", "x", "ex", "e")] == [None] * 5 + [1.0]


def test_the_other_kind_of_output_says_which_it_is():
    (images,) = ImageOutput(["a"])
    assert images == ["a"]
    with pytest.raises(AttributeError, match="makes images; read images"):
        _ = ImageOutput([]).frames
    with pytest.raises(AttributeError, match="makes videos; read frames"):
        _ = VideoOutput([]).images
