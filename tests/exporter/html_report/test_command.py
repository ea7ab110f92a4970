"""`prebake report`, mostly on a compiled artifact: what it writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from prebake.exporter.cli import main as cli
from prebake.exporter.html_report.build import write_page
from prebake.exporter.html_report.facts import gather_facts
from prebake.exporter.progress import Progress
from prebake.runtime import RecipeError
from support.paper_report import NO_TIMES, Tags, words


def test_a_compiled_artifact_has_every_section(page, compiled):
    parsed = Tags(page.read_text())
    sections = [a["id"] for tag, a in parsed.tags if tag == "section"]
    assert sections == ["pictures", "plan", "closeness", "time", "cost", "use", "contents"]
    kept = json.loads((compiled / "reports/verify.json").read_text())
    assert f"{kept['plans']['8']['pictures']['psnr_db']:.1f} dB" in " ".join(parsed.text)
    parts = {path.name for path in page.parent.glob("report-*.png")}
    assert parts == {f"report-{n}.png" for n in ("pictures", "plan-8", "errors", "stages", "steps", "cost")}
    for path in page.parent.glob("report-*.png"):
        assert Image.open(path).width > 300


def test_the_artifact_is_as_it_was_and_still_loads(page, compiled, tiny_artifact):
    from prebake.runtime import load

    assert (compiled / "manifest.json").read_bytes() == (tiny_artifact / "manifest.json").read_bytes()
    load(compiled)


def test_weights_by_kind_add_up_to_what_is_stored(compiled):
    g = gather_facts(compiled, NO_TIMES, Progress())
    stored = sum(e.size for e in g.manifest.files if e.path.startswith("weights/"))
    assert 0.8 * stored < sum(g.weights.values()) <= stored  # the rest are the files' headers
    kinds = {name for name, _ in g.weights}
    assert {"denoiser: attention", "denoiser: feed-forward", "text_encoder", "vae_decoder"} <= kinds


def test_source_draws_anew_and_leaves_the_verification_alone(compiled, tiny_folder, tmp_path, capsys):
    before = {p: p.read_bytes() for p in compiled.rglob("*") if p.is_file() and not p.name.startswith("report")}
    target = tmp_path / "anew.html"
    arguments = ["--source", "--model", str(tiny_folder), "--no-timing", "--output", str(target), "--json"]
    assert cli.main(["report", str(compiled), *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["page"] == str(target)
    assert all(Path(part).is_file() for part in said["parts"])
    assert "Drawn when this page was made" in words(target.read_text())
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "shapes"], "--model: says where the pipeline is; add --source"),
        (["--output", "page.pdf"], "end it in .html"),
    ],
)
def test_choices_without_effect_are_refused(folder, capsys, arguments, said):
    assert cli.main(["report", str(folder), *arguments, "--no-timing"]) == RecipeError.exit_code
    assert said in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said(bare, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        write_page(tmp_path / "file" / "page.html", bare)


def test_without_jinja_it_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["report", str(folder), "--no-timing", "--quiet"]) == 2
    assert "pip install 'prebake[export]'" in capsys.readouterr().err


@pytest.mark.slow  # exports an artifact of its own
def test_an_attached_artifact_is_timed_in_its_pipeline(tmp_path, capsys):
    from prebake.exporter.pipeline import ExportOptions, export
    from support import attach_pipelines as attached

    model = attached.saved("wan", tmp_path / "wan")  # which calls its denoiser twice in a step
    artifact = tmp_path / "artifact"
    mask = {"method": "mask", "mask": "1(01)"}
    export(attached.recipe("wan", model, cache=mask), artifact, ExportOptions(), Progress())
    assert cli.main(["report", str(artifact), "--runs", "2", "--quiet"]) == RecipeError.exit_code
    assert "add --model" in capsys.readouterr().err
    assert cli.main(["report", str(artifact), "--runs", "2", "--quiet", "--model", str(model)]) == 0
    said = words((artifact / "reports/report.html").read_text())
    assert 'attach(pipe, "artifact")' in said
    assert "plan a picture denoiser the rest" in said  # the heads of the table of stages
