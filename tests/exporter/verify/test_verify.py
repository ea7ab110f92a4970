"""Golden vectors, the comparison with eager, and the verdicts, on the exported tiny pipeline."""

import json
import shutil
from dataclasses import replace
from math import inf, isnan, nan
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from prebake.exporter.cli.main import main
from prebake.exporter.load.prompts import picture_prompts
from prebake.exporter.package.folder import file_entries, stage_folder
from prebake.exporter.progress import Progress
from prebake.exporter.recipe.resolve import Recipe
from prebake.exporter.verify import closeness, golden
from prebake.exporter.verify import verify as verification
from prebake.exporter.verify.budget import Costs, choose_workload
from prebake.exporter.verify.checked_prompts import CheckedPrompts, checked_prompts
from prebake.exporter.verify.closeness import relative_error
from prebake.exporter.verify.comparison import Comparison, Sample, measure_pictures
from prebake.exporter.verify.golden import TOLERANCES, GoldenReplay, replay_golden, tolerance_of
from prebake.exporter.verify.outcome import Verdict
from prebake.exporter.verify.replayer import Replayer
from prebake.exporter.verify.verdicts import judge_comparison
from prebake.exporter.verify.verify import VerifyOptions, load_reference, settle_verdict, verify_artifact, write_golden
from prebake.runtime.artifact import open_artifact
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError
from prebake.runtime.manifest import read_manifest

PROMPTS = ("a large red circle", "a small blue square")


@pytest.fixture(scope="session")
def replayer(tiny_artifact):
    return Replayer(open_artifact(tiny_artifact))


def asking(folder, tiny_folder, **thresholds):
    """The manifest, and its recipe with two prompts, one seed, these thresholds and the model where it lies."""
    manifest = read_manifest(folder)
    recipe = Recipe.model_validate(manifest.recipe)
    asked = recipe.verify.model_copy(update={"prompts": PROMPTS, "seeds": 1, **thresholds})
    model = recipe.model.model_copy(update={"id": str(tiny_folder)})
    return manifest, recipe.model_copy(update={"verify": asked, "model": model})


def rewrite_manifest(folder, **changes):
    """The manifest with the folder's files hashed anew."""
    manifest = read_manifest(folder).model_copy(update={"files": file_entries(folder), **changes})
    (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")
    return manifest


def whole_work(replayer, jobs, checked=None):
    """All of it, however long it takes."""
    plans, count = replayer.artifact.plans, len(checked.prompts) if checked else 0
    costs = Costs(dict.fromkeys(("full", "reuse"), 1.0) | dict.fromkeys(replayer.variants, 1.0), 1.0)
    return choose_workload(None, costs, plans, {"full"}, jobs, count)


# --- golden vectors


def test_export_ships_a_golden_file_for_each_plan(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    assert sorted(manifest.plans) == ["8", "8-uncached"]
    assert {f"golden/{plan}.safetensors" for plan in manifest.plans} <= {entry.path for entry in manifest.files}
    stored = load_file(tiny_artifact / "golden/8.safetensors")
    assert stored["outputs"].shape == (8, *stored["final_latents"].shape[1:])
    assert stored["outputs"].dtype == torch.float32
    assert stored["image"].shape == (32, 32, 3)
    assert stored["image"].dtype == torch.uint8
    assert stored["input_ids.0.input_ids_2"].shape == (1, 8)


def test_golden_files_are_the_same_bytes_each_time(tiny_artifact, tiny_folder, copied):
    """Same artifact, same golden vectors: nothing in them comes from the clock or the order of a hash table."""
    shutil.rmtree(copied / "golden")
    rewrite_manifest(copied)
    manifest = write_golden(copied, *asking(copied, tiny_folder, prompts=()))
    for plan in manifest.plans:
        name = f"golden/{plan}.safetensors"
        assert (copied / name).read_bytes() == (tiny_artifact / name).read_bytes()


def test_replay_on_the_same_machine_is_the_same_to_the_bit(replayer):
    for plan in replayer.artifact.plans.values():
        replayed = replay_golden(replayer, plan)
        assert replayed.bitwise
        assert replayed.problems == ()
        assert replayed.evaluation_errors == (0.0,) * 8


def test_replay_fails_when_one_byte_of_the_weights_has_changed(copied):
    """The canary of the golden vectors: hashes are made to fit, so that nothing but the numbers can tell."""
    path = copied / "weights/denoiser.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("proj_out.bias") and weights[n].numel() == 16)
    damaged = weights[name].clone()
    damaged.view(torch.uint8)[1] = 0x40  # the exponent of the first number, which is now between 2 and 8
    save_file({**weights, name: damaged}, path)
    rewrite_manifest(copied)

    _, outcome = verify_artifact(copied, VerifyOptions(), Progress())
    assert len(outcome.missed) >= 2
    assert outcome.missed[0].startswith("golden replay of plan '8': denoiser outputs are off by ")
    assert "0.05 is allowed; " in outcome.missed[0]
    assert main(["verify", str(copied), "--quiet"]) == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"evaluation_errors": (0.0, nan)}, "denoiser outputs are off by nan (relative, L2), 0.001 is allowed; export again on this machine"),
        ({"evaluation_errors": (0.0, 0.002)}, "denoiser outputs are off by 0.002 (relative, L2), 0.001 is allowed; export again on this machine"),
        ({"embeddings_relative_error": inf}, "embeddings are off by inf (relative, L2), 0.001 is allowed; export again on this machine"),
        ({"final_latents_relative_error": 0.5}, "final latents are off by 0.5 (relative, L2), 0.001 is allowed; export again on this machine"),
        ({"image_psnr_db": 59.0}, "the picture has 59.0 dB against the stored one, 60 are asked for; export again on this machine"),
        ({"input_ids_equal": False}, "the tokenizers give other ids than at export; restore tokenizers/, or install the exporter's version of tokenizers"),
        ({"initial_latents_equal": False}, "torch draws other noise from seed 0 than at export, so the rest cannot be compared; use the exporter's torch"),
    ],
)  # fmt: skip
def test_replay_says_what_differs(change, text):
    same = GoldenReplay("4", (0, 1), (0.0, 0.0), 0.0, True, True, 0.0, 120.0, True, TOLERANCES["float32"])
    assert same.problems == ()
    assert replace(same, **change).problems == (f"golden replay of plan '4': {text}",)


def test_golden_files_stay_under_their_cap(replayer, monkeypatch):
    """What does not fit in float32 is kept in float16, and evenly spaced evaluations of it, first and last among them."""
    drawn = replayer.draw(PROMPTS[0], 0, replayer.artifact.plans["8"])
    one = drawn.latents.numel()
    monkeypatch.setattr(golden, "GOLDEN_BYTES", one * 4 * 8)
    assert golden.golden_evaluations(replayer, drawn) == (list(range(8)), torch.float32)
    monkeypatch.setattr(golden, "GOLDEN_BYTES", one * 2 * 8)
    assert golden.golden_evaluations(replayer, drawn) == (list(range(8)), torch.float16)
    monkeypatch.setattr(golden, "GOLDEN_BYTES", one * 2 * 3)
    assert golden.golden_evaluations(replayer, drawn) == ([0, 3, 7], torch.float16)


def test_values_that_are_not_finite_are_refused(replayer):
    drawn = replayer.draw(PROMPTS[0], 0, replayer.artifact.plans["8"])
    broken = [
        replace(c, outputs={"sample": c.outputs["sample"] * inf}) if c.graph == "full" else c for c in drawn.calls
    ]
    with pytest.raises(ExportError, match=r"plan '8', evaluation 0 .* set precision.denoiser"):
        golden.check_finite(replayer.evaluations(replace(drawn, calls=tuple(broken))), "8")


def test_artifact_without_golden_vectors_is_refused(copied):
    shutil.rmtree(copied / "golden")
    rewrite_manifest(copied)
    with pytest.raises(
        ArtifactError,
        match=r"no golden .*\(plan 8, 8-uncached\); `prebake verify .* --source`",
    ):
        verify_artifact(copied, VerifyOptions(), Progress())


def test_tolerance_is_that_of_the_coarsest_arithmetic(tiny_artifact, monkeypatch):
    manifest = read_manifest(tiny_artifact)
    monkeypatch.setattr(golden, "cpu_flags", lambda: {"avx2"})
    lacking = tolerance_of(
        manifest.model_copy(update={"requires": manifest.requires.model_copy(update={"machine": "x86_64"})})
    )
    assert lacking.way_out == golden.NO_VNNI_HINT
    monkeypatch.setattr(golden, "cpu_flags", lambda: {"avx512_vnni"})
    assert tolerance_of(manifest) is TOLERANCES["int8"]
    assert tolerance_of(manifest.model_copy(update={"layers": {}})) is TOLERANCES["bfloat16"]
    assert tolerance_of(manifest.model_copy(update={"layers": {}, "recipe": {}})) is TOLERANCES["float32"]


# --- thresholds


def test_missed_threshold_stops_the_export_and_leaves_nothing(tiny_artifact, tiny_folder, tmp_path):

    def export_what_misses():
        with stage_folder(tmp_path / "out" / "artifact", force=False) as folder:
            shutil.copytree(tiny_artifact, folder, dirs_exist_ok=True)
            asked = asking(folder, tiny_folder, psnr_db=119.0, cached_psnr_db=118.0, relative_error=1e-6)
            settle_verdict(folder, *asked, False, Progress())

    with pytest.raises(ExportError) as refused:
        export_what_misses()
    lines = str(refused.value).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("plan '8': cached_psnr_db is ")
    assert lines[0].endswith(
        "(mean of 2 pictures), expected at least 118; let the cache compute at more steps, or lower verify.cached_psnr_db"
    )
    assert lines[1].startswith("plan '8': relative_error is ")
    assert "evaluations that compute everything), expected at most 1e-06; quantize fewer layers" in lines[1]
    assert lines[2].startswith("plan '8-uncached': psnr_db is ")
    assert (
        "expected at least 119; quantize fewer layers (quantize.exclude), take a wider precision, or lower verify.psnr_db"
        in lines[2]
    )
    assert lines[4] == "the artifact is not written; --keep-failed writes it all the same, marked as failed"
    assert list((tmp_path / "out").iterdir()) == []


def test_keep_failed_marks_the_artifact(copied, tiny_folder):
    settle_verdict(copied, *asking(copied, tiny_folder, psnr_db=119.0), True, Progress())
    assert read_manifest(copied).status == "failed"
    report = json.loads((copied / "reports/verify.json").read_text())
    assert not report["passed"]
    assert len(report["missed"]) == 1
    from prebake.runtime import load

    with pytest.raises(ArtifactError, match="its verification failed"):
        load(copied)


def test_thresholds_that_hold_mark_the_artifact_verified(copied, tiny_folder):
    rewrite_manifest(copied, status="unverified")
    settle_verdict(copied, *asking(copied, tiny_folder), False, Progress())
    assert read_manifest(copied).status == "verified"
    assert (copied / "reports/verify.png").is_file()


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


# --- against eager


def test_evaluations_are_compared_at_the_artifacts_own_inputs(replayer, tiny_artifact, tiny_folder):
    """Errors of one evaluation do not add up over steps, and a denoiser with one other weight is noticed at once."""
    manifest, recipe = asking(tiny_artifact, tiny_folder)
    reference = load_reference(manifest, recipe, str(tiny_folder))
    found = measure_pictures(
        replayer, reference, whole_work(replayer, [(PROMPTS[0], 0), (PROMPTS[0], 1)]), None, Progress()
    )
    uncached = [s for s in found.pictures if s.plan == "8-uncached"]
    assert [len(s.evaluation_errors) for s in uncached] == [8, 0]  # seed 0 only
    assert max(uncached[0].evaluation_errors) < 0.03
    with torch.no_grad():
        reference._pipe.transformer.proj_out.weight[0] += 1.0
    other = measure_pictures(replayer, reference, whole_work(replayer, [(PROMPTS[0], 0)]), None, Progress())
    assert min(e for s in other.pictures for e in s.evaluation_errors) > 0.03


@pytest.fixture
def slow_eager(monkeypatch):
    """As at real size: a picture in eager takes longer than the budget."""
    costs = Costs(dict.fromkeys(("full", "reuse"), 1.0), 60.0)
    monkeypatch.setattr(
        verification,
        "measure_costs",
        lambda replayer, *_: replace(costs, variants=dict.fromkeys(replayer.variants, 1.0)),
    )


def test_with_less_time_than_one_picture_takes_evaluations_decide(slow_eager, copied, tiny_folder, capsys):
    rewrite_manifest(copied, status="unverified")
    settle_verdict(copied, *asking(copied, tiny_folder, budget="5m"), False, Progress())
    manifest = read_manifest(copied)
    assert manifest.status == "verified"
    made = manifest.verification
    assert (made.pictures, made.checked_prompts, made.psnr_db) == ((0, 2), (0, 0), {})
    assert made.evaluations == (4, 32)  # 16 s for the artifact's steps, and 60 s each
    report = json.loads((copied / "reports/verify.json").read_text())
    assert {v["figure"] for v in report["verdicts"]} == {"relative_error"}
    assert report["compared"]["evaluations"] == [4, 32]
    errors = report["plans"]["8"]["relative_error"]
    assert [e is None for e in errors["max_per_evaluation"]].count(False) == errors["evaluations"] == 2
    assert any("compared within verify.budget = 5m" in said for said in report["not_measured"])
    assert any("PSNR was not held to the recipe" in said for said in report["not_measured"])
    assert main(["inspect", str(copied)]) == 0
    assert "0 of 2 pictures, 4 of 32 evaluations" in capsys.readouterr().out


def test_evaluations_alone_miss_an_artifact_that_is_broken(slow_eager, copied, tiny_folder):
    """The canary: one bias of the last layer is another one, and its hash fits."""
    path = copied / "weights/denoiser.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("proj_out.bias") and weights[n].numel() == 16)
    save_file({**weights, name: weights[name] + 1.0}, path)
    rewrite_manifest(copied)
    with pytest.raises(ExportError) as refused:
        settle_verdict(copied, *asking(copied, tiny_folder, budget="5m"), False, Progress())
    assert "plan '8-uncached': relative_error is " in str(refused.value)


def test_a_golden_file_of_a_long_plan_has_its_opening(replayer, copied, monkeypatch):
    """Of a plan that is too long to draw whole: enough steps for each variant, and the picture of the latents there."""
    from prebake.exporter.verify import budget

    monkeypatch.setattr(budget, "WHOLE_EVALUATIONS", 2)
    plan = replayer.artifact.plans["8-uncached"]
    steps = budget.count_opening_steps(plan)
    assert steps == 4
    shutil.rmtree(copied / "golden")
    rewrite_manifest(copied)
    own = Replayer(open_artifact(copied))
    golden.write_plan_golden(own, Recipe.model_validate(own.artifact.manifest.recipe), plan.name)
    stored = load_file(copied / f"golden/{plan.name}.safetensors")
    assert stored["steps"].tolist() == [4]
    assert stored["evaluations"].tolist() == [0, 1, 2, 3]
    replayed = replay_golden(own, plan)
    assert replayed.bitwise
    assert replayed.problems == ()
    whole = replayer.draw(PROMPTS[0], 0, plan)
    assert not torch.equal(whole.latents, stored["final_latents"])


@pytest.mark.parametrize("steps", [torch.tensor([9]), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([2])])
def test_steps_of_a_golden_file_that_cannot_be_are_refused(replayer, monkeypatch, steps):
    plan = replayer.artifact.plans["8"]
    stored = golden.read_golden(replayer.artifact, "8")
    monkeypatch.setattr(golden, "read_golden", lambda *_: {**stored, "steps": steps})
    with pytest.raises(ArtifactError, match=r"golden/8.*'steps'"):
        replay_golden(replayer, plan)


def test_the_reference_is_the_plain_pipeline(tiny_artifact, tiny_folder, tiny_pipe):
    manifest, recipe = asking(tiny_artifact, tiny_folder)
    drawn = load_reference(manifest, recipe, str(tiny_folder)).draw(PROMPTS[0], 3, 8)
    tiny_pipe.set_progress_bar_config(disable=True)
    d, seeded = manifest.defaults, torch.Generator().manual_seed(3)
    call = {"height": d.height, "width": d.width, "guidance_scale": d.guidance_scale, "max_sequence_length": 8}
    expected = tiny_pipe(PROMPTS[0], num_inference_steps=8, generator=seeded, output_type="pt", **call).images
    assert torch.equal(drawn.image, expected)


def test_checked_prompts_are_drawn_with_their_index_as_seed(replayer, tiny_artifact, tiny_folder):
    manifest, recipe = asking(tiny_artifact, tiny_folder)
    reference = load_reference(manifest, recipe, str(tiny_folder))
    seen = []

    def exact(images, prompts):
        seen.append((len(images), images[0].shape, prompts))
        return 0.75

    checked = CheckedPrompts(PROMPTS, exact)
    found = measure_pictures(replayer, reference, whole_work(replayer, [], checked), checked, Progress())
    assert seen == [(2, (32, 32, 3), list(PROMPTS))] * 3  # eager and two plans
    assert [row.seed for row in found.rows] == [0, 1]
    assert found.exact_eager == {8: 0.75}
    assert found.exact == {"8": 0.75, "8-uncached": 0.75}
    assert found.checked_pictures == 2
    assert found.pictures == ()


def test_shapes_brings_its_own_prompts_and_checker():
    recipe = SimpleNamespace(model=SimpleNamespace(id="shapes"), verify=SimpleNamespace(prompts=()))
    assert len(picture_prompts(recipe)) == 8
    checked = checked_prompts("shapes")
    assert len(checked.prompts) == 256
    assert checked_prompts("other/model") is None
    import numpy as np

    from prebake.exporter.shapes.checker import parse_prompt
    from prebake.exporter.shapes.world import place_scene, render_scene

    pictures = [render_scene(place_scene(parse_prompt(p), np.random.default_rng(0))) for p in checked.prompts[:2]]
    assert checked.exact(pictures, list(checked.prompts[:2])) == 1.0


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(0.5, 0.5, 120.0), (0.5, 0.6, 20.0), (0.0, 1.0, 0.0), (0.5, 0.501, 60.0)]
)
def test_psnr(a, b, expected):
    full = torch.full((1, 3, 8, 8), a, dtype=torch.float64)
    assert closeness.psnr_db(full, torch.full_like(full, b)) == pytest.approx(expected, abs=1e-9)


def test_figures_of_values_that_are_not_numbers():
    broken = torch.full((1, 3, 8, 8), nan)
    assert isnan(closeness.psnr_db(broken, broken))
    assert isnan(relative_error(torch.tensor([nan]), torch.ones(1)))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == inf
    assert isnan(closeness.largest_error([1.0, nan, 2.0]))
    assert closeness.largest_error([1.0, 3.0, 2.0]) == 3.0
    assert relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)


# --- the command


def refused(folder, **choices):
    with pytest.raises(RecipeError) as error:
        verify_artifact(folder, VerifyOptions(**choices), Progress())
    return str(error.value)


def test_source_that_is_another_model_is_refused_with_both_hashes(tiny_artifact, tmp_path):
    from support.tiny_pipelines import save_tiny

    other = save_tiny(tmp_path / "other", seed=1)
    text = refused(tiny_artifact, with_source=True, model=str(other))
    from prebake.exporter.load.source import model_fingerprint

    assert f"sha256 over its files is {model_fingerprint(other)}" in text
    assert (
        f"the artifact was made of 'model' with {read_manifest(tiny_artifact).source.sha256}; name that one with --model"
        in text
    )


def test_folder_that_the_manifest_only_names_is_asked_for(tiny_artifact):
    assert refused(tiny_artifact, with_source=True) == (
        "the artifact was made of a folder or file named 'model', and does not say where it lies; add --model FOLDER"
    )


def test_choices_about_the_source_need_source(tiny_artifact):
    assert refused(tiny_artifact, seeds=1, prompt_set="recipe") == (
        "--seeds, --prompt-set: says how the artifact is compared with its pipeline; add --source, or leave it out"
    )


def test_accuracy_without_a_checker_is_refused(tiny_artifact, tiny_folder):
    assert refused(tiny_artifact, with_source=True, model=str(tiny_folder), prompt_set="accuracy") == (
        "--prompt-set accuracy: model 'model' has no checker; leave the option out"
    )


def test_prompts_file_must_have_prompts(tiny_artifact, tmp_path):
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n \n")
    absent = tmp_path / "absent.txt"
    assert (
        refused(tiny_artifact, with_source=True, prompts=empty)
        == f"--prompts {empty}: expected one prompt a line, the file has none"
    )
    assert refused(tiny_artifact, with_source=True, prompts=absent) == (
        f"--prompts {absent}: expected a text file with one prompt a line, but No such file or directory"
    )


def test_recipe_of_another_version_is_refused(copied):
    recipe = {**read_manifest(copied).recipe, "sampling": {}}
    rewrite_manifest(copied, recipe=recipe)
    with pytest.raises(ArtifactError, match=r"manifest\.json \[recipe\.sampling\]: .*; export again"):
        verify_artifact(copied, VerifyOptions(), Progress())


def test_command_compares_and_writes_a_report(tiny_artifact, tiny_folder, tmp_path, capsys):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red circle\na blue square\na red square\n")
    arguments = [
        "--source",
        "--model",
        str(tiny_folder),
        "--prompts",
        str(lines),
        "--limit",
        "2",
        "--seeds",
        "2",
        "--json",
    ]
    assert main(["verify", str(tiny_artifact), *arguments, "--output", str(tmp_path / "report")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report/verify.json").read_text())
    assert report["passed"]
    assert report["plans"]["8"]["pictures"]["pictures"] == 4
    assert report["plans"]["8"]["relative_error"]["pictures"] == 2
    assert (tmp_path / "report/verify.png").is_file()


def test_command_without_source_replays_and_writes_nothing(tiny_artifact, capsys):
    before = sorted(p.as_posix() for p in tiny_artifact.rglob("*"))
    assert main(["verify", str(tiny_artifact)]) == 0
    out = capsys.readouterr().out
    assert "same to the bit" in out
    assert "note: the artifact was compared with the eager pipeline before" in out
    assert sorted(p.as_posix() for p in tiny_artifact.rglob("*")) == before


def test_command_says_where_a_report_cannot_go(tiny_artifact, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["verify", str(tiny_artifact), "--quiet", "--output", str(tmp_path / "file" / "report")]) == 2
    assert (
        "the report cannot be written (Not a directory); choose another folder with --output" in capsys.readouterr().err
    )
