"""Reports: what is in the JSON, that the tables need no rich, and that the sheet can be looked at."""

import io
import json
import sys
import warnings
from math import inf, nan
from types import SimpleNamespace

import pytest
import torch

from prebake.exporter.progress import Progress
from prebake.exporter.verify import report
from prebake.exporter.verify.checked_prompts import CheckedPrompts
from prebake.exporter.verify.comparison import PictureRow, WorstRows
from prebake.exporter.verify.options import VerifyOptions
from prebake.exporter.verify.outcome_tables import print_outcome
from prebake.exporter.verify.picture_sheet import (
    GAP,
    LINE,
    draw_sheet,
    fit_text,
    row_pictures,
    scale_picture,
    sheet_plans,
)
from prebake.exporter.verify.replayer import CallRecord, DrawnPicture, Replayer
from prebake.exporter.verify.verify import compare_with_source, not_compared, verify_artifact
from prebake.runtime.artifact import open_artifact
from prebake.runtime.plan import Evaluation, Plan, Update


def plan(name="28", cache="none", steps=28):
    return Plan(name=name, steps=steps, cache=cache, scheduler="Euler", evaluations=(Evaluation(step=0, variant="full", timestep=1.0, update=Update(latents=(1.0,), outputs=(-1.0,))),))  # fmt: skip


@pytest.fixture(scope="module")
def verified(tiny_artifact, tiny_folder):
    """The manifest, and an outcome with pictures and checked prompts."""
    replayer = Replayer(open_artifact(tiny_artifact))
    manifest = replayer.artifact.manifest
    from prebake.exporter.recipe.resolve import Recipe

    recipe = Recipe.model_validate(manifest.recipe)
    checked = CheckedPrompts(("a red circle", "a blue square"), lambda images, prompts: 0.5)
    return manifest, compare_with_source(
        replayer, recipe, str(tiny_folder), (("a small square", 0),), checked, Progress()
    )


def test_json_has_sorted_keys_and_numbers_that_json_knows():
    text = report.format_json({"b_ms": nan, "a": [inf, {"z": 1.0, "y": -inf}]})
    assert (
        text == '{\n  "a": [\n    "inf",\n    {\n      "y": "-inf",\n      "z": 1.0\n    }\n  ],\n  "b_ms": "nan"\n}\n'
    )


def test_report_has_every_figure(verified):
    described = json.loads(report.format_json(report.describe_outcome(*verified)))
    assert described["passed"]
    assert set(described["plans"]) == {"8", "8-uncached"}
    cached = described["plans"]["8"]
    assert cached["accuracy_percent"] == described["eager"]["8"]["accuracy_percent"] == 50.0
    assert cached["pictures"]["psnr_db"] < described["plans"]["8-uncached"]["pictures"]["psnr_db"]
    assert cached["checked_pictures"]["pictures"] == 2
    assert len(cached["relative_error"]["max_per_evaluation"]) == 8
    assert set(cached["relative_error"]["max_per_variant"]) == set(described["variants"])
    assert 0 < cached["flops_share_percent"] < 100 == described["plans"]["8-uncached"]["flops_share_percent"]
    for figure in (
        cached["image_s"],
        cached["evaluation_ms"],
        described["eager"]["8"]["image_s"],
        described["eager"]["8"]["evaluation_ms"],
    ):
        assert figure > 0
    assert {v["figure"] for v in described["verdicts"]} == {
        "evaluation_error",
        "worst_evaluation_error",
        "picture_error",
        "worst_picture_error",
        "plan_error",
        "weight_error",
        "prompt_accuracy_drop",
    }
    assert cached["compiled_error"]["of_bfloat16_max"] >= cached["compiled_error"]["of_bfloat16_mean"] > 0
    assert len(cached["compiled_error"]["bfloat16_per_evaluation"]) == 8
    assert cached["cached"]["pictures"] == 1
    assert len(described["eager"]["8"]["bfloat16_psnr_db"]) == 1
    assert described["machine"]["threads"] == torch.get_num_threads()
    assert described["thresholds"]["cached_psnr_db"] == 20.0
    assert described["exported_with"]["torch"] == torch.__version__


def test_each_variant_has_its_time_beside_its_flops(verified):
    manifest, _ = verified
    described = report.describe_outcome(*verified)
    full, *others = described["variants"].items()
    assert full[1]["flops_share_percent"] == full[1]["time_share_percent"] == 100.0
    for name, measured in others:
        assert measured["flops_share_percent"] == pytest.approx(
            100 * manifest.graph(name).cost.flops / manifest.graph("full").cost.flops
        )
        assert measured["evaluation_ms"] > 0


def test_report_says_what_was_not_measured(verified, tiny_artifact):
    described = report.describe_outcome(*verified)
    cache, weights = described["not_measured"]
    assert cache == (
        "what the cache loses is reported and not held to the recipe: the artifact has no calibration of this model; "
        "verify.cache_gate=always holds it to verify.cached_psnr_db"
    )
    assert "weights were not held against the model's, which has none of the name: denoiser.folded_0" in weights
    replayed = report.describe_outcome(*verify_artifact(tiny_artifact, VerifyOptions(), Progress()))
    assert replayed["not_measured"] == [
        "the artifact was compared with the eager pipeline before, and passed; `prebake verify --source` compares again"
    ]
    assert "plans" not in replayed


@pytest.mark.parametrize("with_rich", [True, False])
def test_tables_show_every_plan(verified, with_rich, monkeypatch):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    file = io.StringIO()
    print_outcome(*verified, file)
    text = file.getvalue()
    for expected in (
        "eager, 8 steps",
        "plan 8, cache pab",
        "plan 8-uncached",
        "PSNR dB",
        "worst",
        "variants",
        "prompt_accuracy_drop",
        "50.0",
    ):
        assert expected in text
    assert "FAILED" not in text


def row(side, shift):
    image = torch.full((1, 3, side, side), 0.5)
    eager = DrawnPicture(image, image, 1.0)
    return PictureRow(
        "a large red star " * 40, 3, {28: eager}, {"28": DrawnPicture(image + shift, image, 1.0), "28-uncached": eager}
    )


PLANS = (plan("28-uncached"), plan("28", "mask"))


def test_sheet_has_eager_artifacts_and_differences_times_eight():
    eager, uncached, same, _, difference = row_pictures(row(16, 0.05), PLANS)
    assert torch.equal(eager, uncached)
    assert same.max() == 0
    assert difference.min() == pytest.approx(0.4)
    assert row_pictures(row(16, 0.5), PLANS)[-1].max() == 1.0
    image = draw_sheet([row(16, 0.05)], PLANS)
    x, y = GAP + 5, GAP + LINE + GAP + LINE + 5
    assert image.getpixel((x, y)) == (128, 128, 128)
    assert image.getpixel((x + 2 * (224 + GAP), y)) == (0, 0, 0)
    assert image.getpixel((x + 4 * (224 + GAP), y)) == (102, 102, 102)


@pytest.mark.parametrize(("side", "shown"), [(32, 224), (64, 192), (1024, 224)])
def test_sheet_is_large_enough_to_see_and_not_taller_than_a_screen_or_two(side, shown):
    assert scale_picture(torch.zeros(1, 3, side, side)).size == (shown, shown)
    image = draw_sheet([row(side, 0.0)] * 6, PLANS)
    assert image.height <= 1600
    assert image.width < 1300


def test_long_prompts_are_cut_to_the_sheet():
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    assert fit_text("short", 300, font) == "short"
    cut = fit_text("a very long prompt " * 20, 300, font)
    assert cut.endswith("...")
    assert font.getlength(cut) <= 300


def test_sheet_shows_the_default_steps_uncached_first(verified):
    manifest, outcome = verified
    assert [p.name for p in sheet_plans(manifest, outcome.plans)] == ["8-uncached", "8"]
    other = {**outcome.plans, "4": plan("4", "none", 4)}
    assert [p.name for p in sheet_plans(manifest, other)] == ["8-uncached", "8"]


def test_the_worst_pictures_are_kept_and_come_first():
    """Of all that were drawn, whatever their seed: means hide pictures."""
    worst = WorstRows(3)
    for seed, db in enumerate((50.0, 20.2, 47.0, nan, 60.0, 30.0)):
        samples = (SimpleNamespace(psnr_db=90.0), SimpleNamespace(psnr_db=db))
        assert worst.add(PictureRow("a", seed, {}, {}), samples) == samples
    assert [row.seed for row in worst.rows] == [3, 1, 5]


def test_a_picture_that_is_no_number_is_the_worst():
    figures = report.closeness_figures(
        [SimpleNamespace(psnr_db=db, ssim=1.0, latents_relative_error=0.0) for db in (40.0, nan, 30.0)]
    )
    assert str(figures["psnr_db_min"]) == "nan"


@pytest.mark.parametrize(
    ("status", "unverified", "said"),
    [
        ("unverified", (), "was not compared with the eager pipeline: that is `prebake verify --source`"),
        ("verified", (), "was compared with the eager pipeline before, and passed; `prebake"),
        ("verified", ("14",), "before, and passed, its plan 14 excepted; `prebake verify --source` compares again"),
    ],
)
def test_a_replay_alone_says_whether_the_artifact_was_compared_before(status, unverified, said):
    assert said in not_compared(SimpleNamespace(status=status, unverified=unverified))


def test_an_exports_own_prompts_warn_of_nothing(monkeypatch, recwarn):
    """Eager cuts them at the same place, and nobody wrote them here."""

    def pipe(prompt, **_):
        warnings.warn("the prompt is longer than 8 tokens of tokenizer; cut off: 'x'", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return (torch.zeros(1, 3, 2, 2),)

    replayer = object.__new__(Replayer)
    replayer._pipe, replayer.record = pipe, CallRecord()
    monkeypatch.setattr("prebake.exporter.verify.replayer.call_arguments", lambda *_: {})
    with pytest.raises(StopIteration):  # the fake calls no decoder
        replayer.draw("a", 0, plan())
    assert [str(w.message) for w in recwarn] == ["something else"]
