"""Verify: what becomes of an artifact that is compared, and what the command says, on the exported tiny pipeline."""

import json
import shutil
from dataclasses import replace

import pytest

from prebake.exporter.cli.main import main
from prebake.exporter.package.folder import stage_folder
from prebake.exporter.progress import Progress
from prebake.exporter.verify import verify as verification
from prebake.exporter.verify.budget import Costs
from prebake.exporter.verify.options import VerifyOptions
from prebake.exporter.verify.verify import settle_verdict, verify_artifact
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError
from prebake.runtime.manifest import read_manifest
from support.verification import asking, rewrite_manifest

# --- thresholds


def test_missed_threshold_stops_the_export_and_leaves_nothing(tiny_artifact, tiny_folder, tmp_path):

    def export_what_misses():
        with stage_folder(tmp_path / "out" / "artifact", force=False) as folder:
            shutil.copytree(tiny_artifact, folder, dirs_exist_ok=True)
            asked = asking(
                folder,
                tiny_folder,
                picture_error=1e-6,
                worst_picture_error=1e-6,
                cache_gate="always",
                cached_psnr_db=119.0,
                evaluation_error=1e-6,
            )
            settle_verdict(folder, *asked, False, Progress())

    with pytest.raises(ExportError) as refused:
        export_what_misses()
    lines = str(refused.value).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("plan '8': cached_psnr_db is ")
    assert lines[0].endswith(
        "(mean of 2 pictures), expected at least 119; let the cache compute at more steps, or lower verify.cached_psnr_db"
    )
    assert lines[1].startswith("plan '8': evaluation_error is ")
    assert "evaluations, bfloat16 = 1), expected at most 1e-06; quantize fewer layers" in lines[1]
    assert lines[2].startswith("plan '8-uncached': picture_error is ")
    assert "(worst of 2 pictures, bfloat16 = 1), expected at most 1e-06; quantize fewer layers" in lines[3]
    assert lines[4].startswith("plan '8-uncached': evaluation_error is ")
    assert lines[5] == "the artifact is not written; --keep-failed writes it all the same, marked as failed"
    assert list((tmp_path / "out").iterdir()) == []


def test_keep_failed_marks_the_artifact(copied, tiny_folder):
    settle_verdict(copied, *asking(copied, tiny_folder, picture_error=1e-6), True, Progress())
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


# --- with less time than a picture takes


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
    assert {v["figure"] for v in report["verdicts"]} == {
        "evaluation_error",
        "worst_evaluation_error",
        "plan_error",
        "weight_error",
    }
    assert report["compared"]["evaluations"] == [4, 32]
    errors = report["plans"]["8"]["relative_error"]
    assert [e is None for e in errors["max_per_evaluation"]].count(False) == errors["evaluations"] == 2
    assert any("compared within verify.budget = 5m" in said for said in report["not_measured"])
    assert any("pictures were not held to the recipe" in said for said in report["not_measured"])
    assert main(["inspect", str(copied)]) == 0
    assert "0 of 2 pictures, 4 of 32 evaluations" in capsys.readouterr().out


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
