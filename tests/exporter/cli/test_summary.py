"""What a successful export prints: the mean and the worst of its pictures, accuracy, speed, size, time, and where the report is."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from prebake.exporter.cli.export import _result_lines
from prebake.exporter.cli.summary import summarize_artifact, summary_lines

SAMPLES = {"pictures": 32, "psnr_db": 47.2, "psnr_db_min": 20.2}
PLAN = {
    "cache": "pab",
    "steps": 28,
    "pictures": SAMPLES,
    "checked_pictures": {"pictures": 64, "psnr_db": 46.0, "psnr_db_min": 25.0},
    "accuracy_percent": 96.9,
    "image_s": 0.5,
    "speedup": 2.125,
}
TOLD = {"plans": {"28": PLAN}, "eager": {"28": {"accuracy_percent": 98.4}}}
MANIFEST = SimpleNamespace(
    status="verified",
    unquantized_bytes={},
    files=[SimpleNamespace(path=f"weights/text_encoder-0000{i}-of-00002.safetensors", size=3_000_000) for i in (1, 2)],
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose manifest says verified."""
    monkeypatch.setattr("prebake.runtime.manifest.read_manifest", lambda _: MANIFEST)
    monkeypatch.setattr("prebake.runtime.text.folder_bytes", lambda _: {"weights": 9_000_000, "code": 1_000_000})
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "reports").mkdir()
    return tmp_path


def printed(folder, told=TOLD) -> list[str]:
    (folder / "reports/verify.json").write_text(json.dumps(told))
    return list(summary_lines({**summarize_artifact(folder), "seconds": {"lower": 60.0, "verify": 12.0}}))


def test_it_says_what_was_achieved(folder):
    (folder / "reports/verify.png").write_bytes(b"")
    head, plan, size, report = printed(folder)
    assert head.split() == ["plan", "PSNR", "mean", "worst", "of", "right", "eager", "s/image", "speed-up"]
    assert plan == "28, cache pab    47.2 dB  20.2 dB  96  96.9%  98.4%     0.50     2.12x"
    assert size == "verified, 10MB, exported in 72 s"
    assert report == f"report: {folder}/reports/verify.json; verify.png shows the worst pictures first"


def test_weights_are_told_before_and_after_where_something_is_quantized(folder, monkeypatch):
    assert not any(line.startswith("weights") for line in printed(folder))
    monkeypatch.setattr(MANIFEST, "unquantized_bytes", {"text_encoder": 12_000_000})
    assert "weights: text_encoder 6MB (12MB before quantization)" in printed(folder)


def test_the_command_prints_it_below_the_path(folder):
    lines = list(_result_lines({"artifact": str(folder), **summarize_artifact(folder), "seconds": {"lower": 1.0}}))
    assert lines == [str(folder), "verified, 10MB, exported in 1 s"]


def test_the_worst_may_be_a_checked_picture_and_may_be_no_number(folder):
    worse = {**PLAN, "checked_pictures": {"pictures": 64, "psnr_db": 40.0, "psnr_db_min": 9.5}}
    assert " 9.5 dB " in printed(folder, {**TOLD, "plans": {"28": worse}})[1]
    broken = {**PLAN, "checked_pictures": {"pictures": 64, "psnr_db": "nan", "psnr_db_min": "nan"}}
    assert " nan " in printed(folder, {**TOLD, "plans": {"28": broken}})[1]


def test_without_a_checker_nothing_is_said_of_prompts(folder):
    plain = {**PLAN, "checked_pictures": None, "accuracy_percent": None}
    assert printed(folder, {"plans": {"28": plain}, "eager": {"28": {"accuracy_percent": None}}})[1].split()[7:10] == [
        "32",
        "-",
        "-",
    ]


def test_an_artifact_that_was_not_compared_says_so(folder):
    assert list(summary_lines({**summarize_artifact(folder), "status": "unverified", "seconds": {"lower": 1.0}})) == [
        "unverified, 10MB, exported in 1 s"
    ]
