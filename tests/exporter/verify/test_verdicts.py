"""Verdicts: what has a threshold is held to it."""

from dataclasses import replace
from math import nan

import pytest

from prebake.exporter.verify.comparison import Comparison, Sample
from prebake.exporter.verify.outcome import Verdict
from prebake.exporter.verify.verdicts import judge_comparison
from support.verification import asking


@pytest.mark.parametrize(
    ("value", "at_least", "passed"),
    [(45.0, True, True), (44.9, True, False), (nan, True, False), (45.0, False, True), (45.1, False, False), (nan, False, False)],
)  # fmt: skip
def test_verdict(value, at_least, passed):
    assert Verdict("28", "psnr_db", value, 45.0, at_least, "", "").passed is passed


def sample(plan, error, *, variants=("full", "reuse"), psnr_db=50.0):
    errors = (error,) * len(variants)
    return Sample(plan, psnr_db, 1.0, 0.0, errors, errors, tuple((v, 1.0) for v in variants), 1.0, 2.0)


def test_evaluations_that_a_cache_predicts_have_no_threshold(tiny_artifact, tiny_folder, replayer):
    """Their error is the cache's own, which the pictures judge; an evaluation that computes all is held to the recipe."""
    manifest, recipe = asking(tiny_artifact, tiny_folder, relative_error=0.05)
    plans = {"8": replayer.artifact.plans["8"]}
    predicted = replace(sample("8", 0.01), evaluation_errors=(0.01, 0.9))
    computed = replace(predicted, evaluation_errors=(0.9, 0.01))
    figures = [judge_comparison(manifest, recipe, plans, Comparison((s,)))[1] for s in (predicted, computed)]
    assert [(f.figure, f.value, f.passed) for f in figures] == [
        ("relative_error", 0.01, True),
        ("relative_error", 0.9, False),
    ]
    broken = replace(predicted, evaluation_errors=(nan, 0.01))
    assert not judge_comparison(manifest, recipe, plans, Comparison((predicted, broken)))[1].passed


def test_prompt_accuracy_drop_is_held_to_the_recipe(tiny_artifact, tiny_folder, replayer):
    manifest, recipe = asking(tiny_artifact, tiny_folder, prompt_accuracy_drop=2.0)
    found = Comparison(exact_eager={8: 0.96}, exact={"8": 0.93, "8-uncached": 0.95}, checked_pictures=64)
    verdicts = judge_comparison(manifest, recipe, replayer.artifact.plans, found)
    assert [v.passed for v in verdicts] == [False, True]
    assert verdicts[0].sentence == (
        "plan '8': prompt_accuracy_drop is 3 (points, on 64 prompts), expected at most 2; "
        "quantize or cache less, or raise verify.prompt_accuracy_drop"
    )
