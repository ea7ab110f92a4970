"""What the tests of `prebake report` read a page with, and a verification and times that were never measured."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import torch

from prebake.exporter.html_report import timing
from prebake.exporter.html_report.facts import PageFacts, ReportOptions
from prebake.exporter.verify import picture_sheet as sheet
from prebake.exporter.verify.comparison import PictureRow
from prebake.exporter.verify.replayer import DrawnPicture
from support import paper_artifact as paper

NO_TIMES = ReportOptions(runs=0)


class Tags(HTMLParser):
    """Every tag with its attributes, and whether each that was opened was closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def words(page: str) -> str:
    return " ".join(" ".join(Tags(page).text).split())


def drawn_row(prompt: str = "a red circle", side: int = 16, shift: float = 0.1) -> PictureRow:
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 0.8
    return PictureRow(prompt, 0, {2: DrawnPicture(image, image, 1.0)}, {"2": DrawnPicture(image + shift, image, 0.5)})


def described(**changes) -> dict:
    """A `verify.json` of the artifact on paper, whose plan "2" has errors 0.01 and 0.2."""
    near = {"pictures": 3, "psnr_db": 41.25, "psnr_db_min": 33.5, "ssim": 0.99, "ssim_min": 0.9}
    errors = {"pictures": 3, "max": 0.2, "mean": 0.105, "max_per_evaluation": [0.01, 0.2]}
    figures = {
        "evaluations": ["full", "reuse"],
        "flops_share_percent": 50.0,
        "pictures": near,
        "checked_pictures": None,
        "relative_error": errors,
        "accuracy_percent": None,
        "image_s": 0.5,
        "speedup": 2.125,
    }
    verdict = {"plan": "2", "figure": "psnr_db", "value": 41.25, "threshold": 30.0, "passed": True, "over": "mean of 3"}
    return {
        "passed": True,
        "missed": [],
        "not_measured": ["the moon was not weighed"],
        "model": {"model": "m", "pipeline": "FluxPipeline", "sha256": "0" * 64},
        "machine": {"cpu": "a CPU", "threads": 3, "torch": "9.9"},
        "plans": {"2": figures},
        "eager": {"2": {"accuracy_percent": None, "image_s": 1.0625}},
        "verdicts": [verdict],
    } | changes


def verify_on_paper(folder: Path, rows: list[PictureRow], **changes) -> None:
    (folder / "reports/verify.json").write_text(json.dumps(described(**changes)))
    sheet.save_sheet(rows, [paper.PLAN], folder / "reports/verify.png")


def timed(g: PageFacts) -> PageFacts:
    """With three rounds of made-up times."""
    times = timing.PlanTimes()
    for k in range(3):
        evaluations = tuple(1.0 + k + e for e, _ in enumerate(g.shown[0].evaluations))
        times.image_s.append(0.020 + k / 1e3)
        times.evaluations_ms.append(evaluations)
        times.stages_ms.append({"text_encoder": 2.0, timing.DENOISER_STAGE: sum(evaluations), timing.REST_STAGE: 1.0})
    machine = {"cpu": "a CPU", "threads": 1, "torch": "9.9"}
    return replace(g, times=timing.ReportTimes("a", 3, 0.5, {g.shown[0].name: times}, machine))
