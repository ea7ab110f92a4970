"""Verdicts: what has a threshold is held to it, in units of what eager bfloat16 loses; and what has none is said."""

from dataclasses import replace
from math import nan

import pytest

from prebake.exporter.verify.comparison import Comparison, Sample
from prebake.exporter.verify.gaps import comparison_gaps
from prebake.exporter.verify.loss import Bfloat16Loss
from prebake.exporter.verify.outcome import Verdict
from prebake.exporter.verify.verdicts import judge_comparison
from prebake.runtime.manifest import FileEntry
from support.verification import asking

LOSS = Bfloat16Loss({None: [(0.0, 0.004)]}, {8: [40.0, 40.0]})


@pytest.mark.parametrize(
    ("value", "at_least", "passed"),
    [(45.0, True, True), (44.9, True, False), (nan, True, False), (45.0, False, True), (45.1, False, False), (nan, False, False)],
)  # fmt: skip
def test_verdict(value, at_least, passed):
    assert Verdict("28", "cached_psnr_db", value, 45.0, at_least, "", "").passed is passed


def sample(plan, *compiled, psnr_db=50.0, uncached_psnr_db=None):
    none = (None,) * len(compiled)
    variants = (("full", 1.0),) * len(compiled)
    return Sample(plan, psnr_db, 1.0, 0.0, none, none, variants, 1.0, 2.0, compiled, uncached_psnr_db)


@pytest.fixture
def judged(tiny_artifact, tiny_folder, replayer):
    """Figure -> (value, passed) of one plan, given samples and thresholds."""

    def judge(plan, *samples, loss=LOSS, calibrated=False, **thresholds):
        manifest, recipe = asking(tiny_artifact, tiny_folder, **thresholds)
        if calibrated:
            entry = FileEntry(path="calibration.json", size=1, sha256="0" * 64)
            manifest = manifest.model_copy(update={"files": (*manifest.files, entry)})
        plans = {plan: replayer.artifact.plans[plan]}
        comparison = Comparison(samples, loss=loss)
        verdicts = judge_comparison(manifest, recipe, plans, comparison)
        judge.gaps = comparison_gaps(manifest, recipe, plans, comparison)
        return {v.figure: (v.value, v.passed) for v in verdicts}

    return judge


def test_evaluations_are_measured_by_what_bfloat16_loses_mean_and_worst(judged):
    asked = {"evaluation_error": 1.5, "worst_evaluation_error": 2.5}
    found = judged("8", sample("8", 0.004, 0.004, None, 0.008), **asked)
    assert found == {
        "evaluation_error": (pytest.approx(4 / 3), True),
        "worst_evaluation_error": (pytest.approx(2.0), True),
    }
    one_is_far = judged("8", sample("8", *[0.004] * 7, 0.0101), **asked)
    assert [passed for _, passed in one_is_far.values()] == [True, False]  # a mean hides it
    all_are_far = judged("8", sample("8", *[0.0064] * 8), **asked)
    assert [passed for _, passed in all_are_far.values()] == [False, True]
    assert not any(passed for _, passed in judged("8", sample("8", 0.004, nan)).values())


def test_pictures_without_cache_are_measured_by_bfloat16s_mean_and_worst(judged):
    asked = {"picture_error": 1.5, "worst_picture_error": 2.0}
    found = judged("8-uncached", sample("8-uncached", psnr_db=40.0), sample("8-uncached", psnr_db=36.0), **asked)
    assert found["picture_error"] == (pytest.approx((1 + 10**0.2) / 2), True)
    assert found["worst_picture_error"] == (pytest.approx(10**0.2), True)
    worse = judged("8-uncached", sample("8-uncached", psnr_db=60.0), sample("8-uncached", psnr_db=20.0), **asked)
    assert worse["worst_picture_error"] == (pytest.approx(10.0), False)
    assert not judged("8-uncached", sample("8-uncached", psnr_db=nan), **asked)["picture_error"][1]


def test_where_bfloat16s_pictures_are_equal_rounding_to_8_bits_is_the_unit(judged):
    exact = Bfloat16Loss({}, {8: [120.0]})
    found = judged("8-uncached", sample("8-uncached", psnr_db=60.0), loss=exact)
    assert found["picture_error"] == (pytest.approx(1e-3 * 255 * 12**0.5), True)


def test_a_cache_is_held_to_its_own_threshold_where_the_model_is_calibrated(judged):
    """Of another model nobody has tried what it may lose: that is said, and a recipe may ask for more."""
    bad = sample("8", psnr_db=50.0, uncached_psnr_db=15.0)
    asked = {"cached_psnr_db": 20.0, "worst_cached_psnr_db": 18.0}
    assert judged("8", bad, **asked) == {}
    assert any("verify.cache_gate=always" in said for said in judged.gaps)
    for where in ({"calibrated": True}, {"cache_gate": "always"}):
        found = judged("8", bad, sample("8", uncached_psnr_db=40.0), **asked, **where)
        assert found == {"cached_psnr_db": (27.5, True), "worst_cached_psnr_db": (15.0, False)}
        assert not any("cache_gate" in said for said in judged.gaps)


def test_prompt_accuracy_drop_is_held_to_the_recipe(tiny_artifact, tiny_folder, replayer):
    manifest, recipe = asking(tiny_artifact, tiny_folder, prompt_accuracy_drop=2.0)
    found = Comparison(exact_eager={8: 0.96}, exact={"8": 0.93, "8-uncached": 0.95}, checked_pictures=64)
    verdicts = judge_comparison(manifest, recipe, replayer.artifact.plans, found)
    assert [v.passed for v in verdicts] == [False, True]
    assert verdicts[0].sentence == (
        "plan '8': prompt_accuracy_drop is 3 (points, on 64 prompts), expected at most 2; "
        "quantize or cache less, or raise verify.prompt_accuracy_drop"
    )


def test_evaluations_that_no_eager_variant_repeated_are_named(judged):
    predicted = replace(sample("8", None), evaluation_errors=(0.9,))
    assert judged("8", predicted) == {}
    assert any("were not held against the same ones in eager" in said for said in judged.gaps)
