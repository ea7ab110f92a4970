"""Plans are added to an artifact and taken out of it without a compiler, and a run that fails changes nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from prebake.exporter import add_plan as replan
from prebake.exporter.caches import Decision, FasterCache, Schedule
from prebake.exporter.caches.fastercache import check_branches
from prebake.exporter.cli.main import main
from prebake.exporter.plan import inputs
from prebake.exporter.replan import rebuild
from prebake.exporter.sites.marks import Mark
from prebake.exporter.verify.golden import replay_golden
from prebake.exporter.verify.replayer import Replayer
from prebake.exporter.verify.source_pipeline import manifest_recipe
from prebake.runtime import load
from prebake.runtime.artifact import open_artifact
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError, RequestError
from prebake.runtime.manifest import read_manifest
from support.plan_additions import added, contents

pytestmark = pytest.mark.usefixtures("private_cache")
VERIFIED = ("verify.seeds=1", "verify.prompts=a large red circle")


def test_a_plan_that_the_export_made_comes_out_again_to_the_byte(copied):
    before = contents(copied)
    added(copied, 8, force=True)
    after = contents(copied)
    assert after["plans/8.json"] == before["plans/8.json"]
    assert after["plans/8-uncached.json"] == before["plans/8-uncached.json"]
    assert after["golden/8.safetensors"] == before["golden/8.safetensors"]
    assert read_manifest(copied).unverified == ("8", "8-uncached")


def test_an_added_plan_is_run_listed_and_replayed(copied):
    weights = next((copied / "weights").iterdir()).stat().st_ino
    with pytest.raises(RequestError, match=rf"`prebake plan {re.escape(str(copied))} --steps 5` adds one"):
        load(copied)("red", num_inference_steps=5)
    manifest, plans = added(copied, 5)
    assert list(plans) == ["5", "5-uncached"]
    assert manifest.unverified == ("5", "5-uncached")
    assert manifest.status == read_manifest(copied).status == "verified"
    assert {"full", "reuse"} == set(plans["5"].variants())
    artifact = open_artifact(copied)
    assert replay_golden(Replayer(artifact), artifact.plans["5"]).bitwise
    pipe = load(copied)
    with_cache = pipe("red", seed=1, num_inference_steps=5, output_type="latent").images
    without = pipe("red", seed=1, num_inference_steps=5, output_type="latent", cache=False).images
    assert with_cache.isfinite().all()
    assert not torch.equal(with_cache, without)
    assert next((copied / "weights").iterdir()).stat().st_ino == weights  # linked, not copied
    assert [p.name for p in copied.parent.iterdir()] == [copied.name]


def test_the_added_plan_is_the_one_that_an_export_would_have_made(copied, tiny_pipe):
    from prebake.exporter.families import flux
    from prebake.exporter.plan import make_plans
    from prebake.exporter.plan.sampler import tabulate_scheduler
    from support.known_layouts import layout_of

    size = flux.Size(32, 32, 8)
    table = tabulate_scheduler(
        tiny_pipe.scheduler,
        6,
        **flux.scheduler_arguments(tiny_pipe.scheduler, flux.facts(tiny_pipe, size)["latents_shape"], 6),
    )
    cache = manifest_recipe(copied, read_manifest(copied)).cache
    expected = make_plans(cache, layout_of(flux.denoiser(tiny_pipe, size)), {6: table}).plans
    _, plans = added(copied, 6, dry_run=True)
    assert tuple(plans.values()) == expected


def test_a_plan_added_to_an_artifact_that_takes_pictures_begins_anywhere_too(copied):
    for plan in added(copied, 6, "sampler.image_to_image=true", dry_run=True)[1].values():
        assert [tail.step for tail in plan.tails] == [1, 2, 3, 4, 5]
        assert all(plan.tail(step).evaluations[0].variant == "full" for step in range(6))
    assert not any(plan.tails for plan in added(copied, 6, dry_run=True)[1].values())


def test_a_dry_run_changes_nothing(copied):
    before = contents(copied)
    added(copied, 5, dry_run=True)
    assert contents(copied) == before


def test_a_plan_that_is_there_is_kept_unless_forced(copied):
    with pytest.raises(RequestError, match=r"plan '8' is there already; replace it with --force"):
        added(copied, 8)


def test_another_scheduler_and_no_cache(copied):
    _, plans = added(copied, 3, "sampler.scheduler=FlowMatchLCMScheduler", "cache.method=none")
    assert list(plans) == ["3"]
    assert plans["3"].scheduler == "FlowMatchLCMScheduler"
    assert len(plans["3"].evaluations) == 3
    assert load(copied)("red", seed=1, num_inference_steps=3, output_type="pt").images.isfinite().all()


def test_a_cache_whose_variants_are_not_compiled_is_refused_with_those_that_are(copied):
    before = contents(copied)
    with pytest.raises(ExportError) as e:
        added(copied, 6, "cache.method=mask", "cache.mask=1(01)")
    assert "no compiled variant does what this cache asks for: combine blocks[0:3] (evaluations 1, 3, 5)" in str(
        e.value
    )
    assert "The artifact has: full = compute all; reuse = combine transformer_blocks.0.attn, " in str(e.value)
    assert contents(copied) == before


def test_a_cache_that_reads_weights_is_refused_with_keys_that_exist(copied):
    signal = ("cache.method=teacache", "cache.signal=time_embedding")
    with pytest.raises(ExportError, match=r"'time_embedding' decides .*cache.signal=modulated"):
        added(copied, 6, *signal)
    with pytest.raises(ExportError, match="needs a calibration"):
        added(copied, 6, *signal, "cache.signal=modulated")


def test_a_cache_that_needs_branches_split_by_frequency_is_refused_with_a_way_out():
    guided = SimpleNamespace(branches=("uncond", "cond"), planes=False)
    with pytest.raises(ExportError, match="an artifact must be exported again with this cache"):
        check_branches(FasterCache(), guided)


def test_a_cache_that_skips_nothing_is_refused(copied):
    with pytest.raises(ExportError, match=r"cache.method 'pab' skips nothing at 1 steps"):
        added(copied, 1)


def test_a_run_that_is_interrupted_leaves_the_artifact_as_it_was(copied, monkeypatch):
    before = contents(copied)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(replan, "write_plan_golden", interrupted)
    with pytest.raises(KeyboardInterrupt):
        added(copied, 5)
    assert contents(copied) == before
    assert [p.name for p in copied.parent.iterdir()] == [copied.name]


def test_a_plan_is_removed_with_its_uncached_twin(copied):
    before = contents(copied)
    added(copied, 5)
    manifest = replan.remove_plan(copied, "5")
    assert list(manifest.plans) == ["8", "8-uncached"]
    assert manifest.unverified == ()
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("8", "plan '8' belongs to the default of 8 steps, and stays"),
        ("8-uncached", "plan '8-uncached' belongs to the default of 8 steps, and stays"),
        ("9", "has no plan '9'; it has 8, 8-uncached"),
    ],
)
def test_what_cannot_be_removed_is_named(copied, name, words):
    with pytest.raises(RecipeError, match=words):
        replan.remove_plan(copied, name)


def test_an_artifact_of_an_older_export_is_refused_by_name(copied):
    manifest = read_manifest(copied)
    (copied / inputs.PLAN_INPUTS_FILE).unlink()
    files = tuple(f for f in manifest.files if f.path != inputs.PLAN_INPUTS_FILE)
    (copied / "manifest.json").write_text(manifest.model_copy(update={"files": files}).to_json(), "utf-8")
    with pytest.raises(ArtifactError, match=r"has no replan.json, .*; export again"):
        added(copied, 5)


def test_a_verified_plan_is_no_longer_listed_as_unverified(copied, tiny_folder):
    (copied / "reports/plan-4").mkdir()
    (copied / "reports/plan-4/verify.json").write_text("an earlier report", "utf-8")
    second_link = copied.with_name("second-link")
    second_link.hardlink_to(copied / "reports/plan-4/verify.json")
    manifest, _ = added(copied, 4, *VERIFIED, verify=True, model=str(tiny_folder))
    assert manifest.unverified == read_manifest(copied).unverified == ()
    assert second_link.read_text("utf-8") == "an earlier report"  # a run that is killed would have left it there
    assert json.loads((copied / "reports/plan-4/verify.json").read_text())["passed"]
    open_artifact(copied)


def test_a_plan_that_is_replaced_or_removed_takes_its_report_along(copied):
    added(copied, 5)
    report = copied / "reports/plan-5/verify.json"
    report.parent.mkdir(parents=True)
    report.write_text("of the first plan", "utf-8")
    added(copied, 5, "cache.method=none", force=True)
    assert not report.exists()
    report.parent.mkdir()
    report.write_text("of the second plan", "utf-8")
    replan.remove_plan(copied, "5")
    assert not report.parent.exists()
    assert (copied / "reports/verify.json").exists()


def test_a_plan_without_a_cache_takes_the_place_of_a_cached_one_and_its_twin(copied):
    added(copied, 5)
    manifest, _ = added(copied, 5, "cache.method=none", force=True)
    assert set(manifest.plans) == {"5", "8", "8-uncached"}
    assert manifest.unverified == ("5",)
    assert set(open_artifact(copied).plans) == set(manifest.plans)
    assert not (copied / "golden/5-uncached.safetensors").exists()
    pipe = load(copied)
    drawn = [pipe("red", seed=1, num_inference_steps=5, output_type="latent", cache=c).images for c in (True, False)]
    assert torch.equal(*drawn)


def test_a_plan_that_misses_a_threshold_is_not_added(copied, tiny_folder):
    before = contents(copied)
    with pytest.raises(ExportError, match=r"(?s)picture_error.*the plan is not added"):
        added(copied, 4, *VERIFIED, "verify.picture_error=1e-6", verify=True, model=str(tiny_folder))
    assert contents(copied) == before


# --- sites under other names


A = Mark("blocks", ("t.0", "t.1"), ("hidden_states",), residual=True, slots=2)


def test_an_equal_site_under_another_name_and_with_fewer_slots_is_the_same():
    named = replace(A, name="cond/blocks[0:2]", slots=1, stored_streams=())
    asked = Schedule((named,), (Decision(), Decision.reuse(named)))
    translated = rebuild.rename_sites((A,), asked)
    assert translated.marks == (A,)
    assert translated.decisions[1] == Decision({"blocks": "combine"}, {"blocks": (1.0, 0.0)})


@pytest.mark.parametrize(
    "change", [{"modules": ("t.0",)}, {"residual": False}, {"emitted": True}, {"dtype": "bfloat16"}]
)
def test_a_site_that_differs_is_another_one(change):
    asked = Schedule((replace(A, name="x", **change),), ())
    assert [m.name for m in rebuild.rename_sites((A,), asked).marks] == ["blocks", "x"]


def test_more_slots_than_the_variants_have_is_refused():
    with pytest.raises(ExportError, match=r"combines 3 stored .* room for 2; lower the order"):
        rebuild.pad_coefficients(A, (3.0, -3.0, 1.0))


# --- the command


def test_the_command_says_what_it_added_and_that_nobody_verified_it(copied, capsys):
    assert main(["plan", str(copied), "--steps", "5", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["plan", str(copied), "--steps", "6", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unverified"] == ["6", "6-uncached"]
    assert told["plans"]["6"]["strip"].count("0") == told["plans"]["6"]["calls"]["reuse"]
    assert told["plans"]["6-uncached"]["flops_share"] == 1.0
    assert main(["inspect", str(copied)]) == 0
    out = capsys.readouterr().out
    assert "added since, and not compared with the pipeline: 5, 5-uncached, 6, 6-uncached; " in out
    assert main(["plan", str(copied), "--remove", "6"]) == 0
    assert capsys.readouterr().out == f"removed 6; {copied} has the plans 5, 5-uncached, 8, 8-uncached\n"


def test_the_command_draws_the_plan(copied, capsys):
    assert main(["plan", str(copied), "--steps", "4", "--cache", "none", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["4", "100.0%", "4", "full", "████"]
    assert lines[-1] == "█ = full"


def test_what_is_compiled_in_cannot_be_changed_by_a_plan(copied, capsys):
    assert main(["plan", str(copied), "--steps", "4", "--set", "precision.denoiser=float32"]) == 2
    assert "is compiled in; a plan can change cache, sampler and verify" in capsys.readouterr().err


def test_verify_of_everything_settles_an_added_plan(copied, tiny_folder):
    """Not one of another scheduler, whose pictures are others."""
    weights = next((copied / "weights").iterdir()).stat().st_ino
    added(copied, 5)
    added(copied, 3, "sampler.scheduler=FlowMatchLCMScheduler", "cache.method=none")
    assert main(["verify", str(copied), "--source", "--model", str(tiny_folder), "--quiet"]) == 0
    manifest = read_manifest(copied)
    assert (manifest.status, manifest.unverified) == ("verified", ("3",))
    assert load(copied)("red", seed=1, num_inference_steps=5, output_type="latent").images.isfinite().all()
    assert next((copied / "weights").iterdir()).stat().st_ino == weights  # linked, not copied
