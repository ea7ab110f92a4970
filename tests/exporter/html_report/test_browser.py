"""The page of `prebake report` in a browser: it fits a phone and a screen, and asks for nothing but itself."""

from __future__ import annotations

import re
import statistics
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prebake.exporter.html_report import plan_strip, verification
from prebake.exporter.html_report.build import write_page
from prebake.exporter.html_report.facts import PageFacts, gather_facts
from prebake.exporter.progress import Progress
from support import headless_chromium as chromium
from support import paper_artifact as paper
from support.paper_report import NO_TIMES, drawn_row, timed, verify_on_paper

WIDTHS = (320, 390, 759, 760, 1280)
browser = pytest.mark.skipif(chromium.found() is None, reason="no chromium here: apt-get install chromium")


def long_page(folder: Path) -> PageFacts:
    """Names, prompts and numbers of steps far longer than usual, and more sites than a strip has rows."""
    name = "transformer_blocks." * 6 + "attn"
    verify_on_paper(folder, [drawn_row("word" * 60), drawn_row("a red circle " * 30)])
    g = gather_facts(folder, NO_TIMES, Progress())
    first = paper.PLAN.evaluations[0]
    plan = paper.PLAN.model_copy(
        update={"steps": 100, "evaluations": tuple(first.model_copy(update={"step": i}) for i in range(100))}
    )
    rows = tuple(
        plan_strip.StripRow((f"{name}.{i}",), ("compute", "combine", "pass", "zero", "identity") * 20)
        for i in range(40)
    )
    assert g.verification
    figures = g.verification.verified.plans["2"]
    assert figures.relative_error
    errors = figures.relative_error.model_copy(update={"max_per_evaluation": (1e-7, 0.3) * 50})
    plans = {"2": figures.model_copy(update={"relative_error": errors})}
    saved = verification.SavedVerification(
        g.verification.verified.model_copy(update={"plans": plans}), g.verification.shown, g.verification.png
    )
    manifest = g.manifest.model_copy(update={"toolchain": {"w" * 90: "1"}, "layers": {"a": ("int8", "why " * 60)}})
    return timed(
        replace(
            g,
            name="artifact" * 20,
            manifest=manifest,
            plans={"2": plan},
            shown=(plan,),
            strips={"2": rows},
            verification=saved,
        )
    )


def fits(seen: list[dict], dark: bool) -> None:
    for view in seen:
        assert view["scroll"] <= view["width"], view
        assert view["wide"] == [], view  # nothing hangs out of the page where it does not scroll by itself
        assert view["cut"] == [], view  # nor text out of its plot
        assert view["images"]
        assert view["small"] >= 9, view  # pixels of the smallest letters' line
        channels = [int(c) for c in re.findall(r"\d+", view["background"])[:3]]
        assert (statistics.fmean(channels) < 60) == dark


@browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_a_phone_and_a_screen(page, dark):
    fits(chromium.measured(page, WIDTHS, dark=dark), dark)


@browser
def test_the_longest_page_fits_too(folder, tmp_path):
    (path, *_) = write_page(tmp_path / "long.html", long_page(folder))
    fits(chromium.measured(path, WIDTHS, dark=False), dark=False)


@browser
def test_canary_what_is_too_wide_is_seen(bare, tmp_path):
    (path, *_) = write_page(tmp_path / "page.html", bare)
    wide = path.read_text().replace("<main>", '<main><p style="width: 500px">wide</p>')
    path.write_text(wide)
    phone, screen = chromium.measured(path, (390, 1280), dark=False)
    assert phone["scroll"] > phone["width"]
    assert "wide" in phone["wide"][0]
    assert screen["scroll"] <= screen["width"]


@pytest.fixture
def elsewhere():
    """The address of a server, and the list of what it is asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            """Not to the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@browser
def test_a_browser_asks_for_nothing_but_the_page(page, tmp_path, elsewhere):
    """Nor does it for what somebody put into it: the page's own policy forbids that. Without the policy it would."""
    address, asked = elsewhere
    assert chromium.measured(page, (390,), dark=False)[0]["asked"] == []
    smuggled = tmp_path / "page.html"
    smuggled.write_text(page.read_text().replace("<main>", f'<main><img src="{address}/picture.png">'))
    chromium.measured(smuggled, (390,), dark=False)
    assert asked == []
    smuggled.write_text(smuggled.read_text().replace("Content-Security-Policy", "X-Nothing"))
    chromium.measured(smuggled, (390,), dark=False)
    assert asked == ["/picture.png"]
