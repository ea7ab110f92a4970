"""Plans are added to an artifact and taken out of it without a compiler, and a run that fails changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from prebake.exporter import replan
from prebake.exporter.caches import Decision, Schedule
from prebake.exporter.cli import main
from prebake.exporter.golden import replay_golden
from prebake.exporter.marks import Mark
from prebake.exporter.progress import progress
from prebake.exporter.quality import Replayer
from prebake.exporter.recipe import changed
from prebake.exporter.verify import recipe_of
from prebake.runtime import load
from prebake.runtime.artifact import open_artifact
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError
from prebake.runtime.manifest import read_manifest

VERIFIED = ("verify.seeds=1", "verify.prompts=a large red circle")


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "replan-cache"))


@pytest.fixture
def copied(tiny_artifact, tmp_path):
    """The artifact (8 steps, attention reuse) in a folder of the test's own."""
    return shutil.copytree(tiny_artifact, tmp_path / "copied")


def added(folder, steps: int, *overrides: str, **choices):
    recipe = recipe_of(folder, read_manifest(folder))
    recipe = changed(recipe, "recipe", [f"sampler.steps={steps}", *overrides])
    with progress("quiet") as quiet:
        return replan.add(folder, recipe, steps, replan.Choices(**choices), quiet)


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
    from prebake.exporter.discover import discover
    from prebake.exporter.families import flux
    from prebake.exporter.plan import plan
    from prebake.exporter.plan.sampler import tabulate

    size = flux.Size(32, 32, 8)
    table = tabulate(tiny_pipe.scheduler, 6, **flux.scheduler_arguments(tiny_pipe, size, 6))
    cache = recipe_of(copied, read_manifest(copied)).cache
    expected = plan(cache, discover(flux.denoiser(tiny_pipe, size)), {6: table}).plans
    _, plans = added(copied, 6, dry_run=True)
    assert tuple(plans.values()) == expected


def test_a_dry_run_changes_nothing(copied):
    before = contents(copied)
    added(copied, 5, dry_run=True)
    assert contents(copied) == before


def test_a_plan_that_is_there_is_kept_unless_forced(copied):
    with pytest.raises(ExportError, match=r"plan '8' is there already; replace it with --force"):
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
    manifest = replan.remove(copied, "5")
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
        replan.remove(copied, name)


def test_an_artifact_of_an_older_export_is_refused_by_name(copied):
    manifest = read_manifest(copied)
    (copied / replan.FILE).unlink()
    files = tuple(f for f in manifest.files if f.path != replan.FILE)
    (copied / "manifest.json").write_text(manifest.model_copy(update={"files": files}).to_json(), "utf-8")
    with pytest.raises(ArtifactError, match=r"has no replan.json, which says what a plan is made of; export again"):
        added(copied, 5)


def test_a_verified_plan_is_no_longer_listed_as_unverified(copied, tiny_folder):
    manifest, _ = added(copied, 4, *VERIFIED, verify=True, model=str(tiny_folder))
    assert manifest.unverified == read_manifest(copied).unverified == ()
    assert json.loads((copied / "reports/plan-4/verify.json").read_text())["passed"]
    open_artifact(copied)


def test_a_plan_that_misses_a_threshold_is_not_added(copied, tiny_folder):
    before = contents(copied)
    with pytest.raises(ExportError, match=r"(?s)psnr_db.*the plan is not added"):
        added(copied, 4, *VERIFIED, "verify.psnr_db=110", verify=True, model=str(tiny_folder))
    assert contents(copied) == before


# --- sites under other names


A = Mark("blocks", ("t.0", "t.1"), ("hidden_states",), residual=True, slots=2)


def test_an_equal_site_under_another_name_and_with_fewer_slots_is_the_same():
    named = replace(A, name="cond/blocks[0:2]", slots=1, kept=())
    asked = Schedule((named,), (Decision(), Decision.reuse(named)))
    translated = replan.in_terms_of((A,), asked)
    assert translated.marks == (A,)
    assert translated.decisions[1] == Decision({"blocks": "combine"}, {"blocks": (1.0, 0.0)})


@pytest.mark.parametrize(
    "change", [{"modules": ("t.0",)}, {"residual": False}, {"emitted": True}, {"dtype": "bfloat16"}]
)
def test_a_site_that_differs_is_another_one(change):
    asked = Schedule((replace(A, name="x", **change),), ())
    assert [m.name for m in replan.in_terms_of((A,), asked).marks] == ["blocks", "x"]


def test_more_slots_than_the_variants_have_is_refused():
    with pytest.raises(
        ExportError, match=r"combines 3 stored values, the artifact's variants have room for 2; lower the order"
    ):
        replan.padded(A, (3.0, -3.0, 1.0))


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
