"""What pages say of measurements is what the benchmarks' files say, and growth is found where it was put."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(ROOT / "benchmarks"))  # last, since its modules have short names

import figures  # noqa: E402
import scaling_figures  # noqa: E402
import tables  # noqa: E402

AGAIN = "`python benchmarks/tables.py` writes it anew"
NAMES = {name: page for page in tables.PAGES for _, name, _ in tables.REGION.findall((ROOT / page).read_text("utf-8"))}


@pytest.mark.parametrize("page", tables.PAGES)
def test_a_page_says_what_the_files_say(page):
    assert tables.fill_page(page) == (ROOT / page).read_text("utf-8"), AGAIN


def test_every_figure_is_on_a_page():
    assert set(NAMES) == set(tables.FIGURES)


@pytest.mark.parametrize("page", tables.PAGES)
def test_every_comment_that_begins_figures_is_followed_by_one_that_ends_them(page):
    text = (ROOT / page).read_text("utf-8")
    begun = text.count("<!-- figures: ") - text.count("<!-- figures: end -->")
    assert begun == text.count("<!-- figures: end -->") == len(tables.REGION.findall(text))


@pytest.mark.parametrize("name", tables.FIGURES)
def test_files_that_change_change_the_page(name, tmp_path):
    page, (_, files) = NAMES[name], tables.FIGURES[name]
    for file in {page, *(file for _, files in tables.FIGURES.values() for file in files)}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    assert tables.fill_page(page, tmp_path) == (ROOT / page).read_text("utf-8")
    for file in files:
        changed = uneven(json.loads((ROOT / file).read_text("utf-8")))
        (tmp_path / file).write_text(json.dumps(changed), "utf-8")
    before, after = (
        region(name, text) for text in ((ROOT / page).read_text("utf-8"), tables.fill_page(page, tmp_path))
    )
    assert before != after


def region(name: str, page: str) -> str:
    return next(found[0] for found in tables.REGION.finditer(page) if found[2] == name)


def uneven(value: Any) -> Any:
    """With all numbers larger, the large ones by more, so that ratios and exponents change too."""
    if isinstance(value, dict):
        return {key: uneven(v) for key, v in value.items()}
    if isinstance(value, list):
        return [uneven(v) for v in value]
    return value + abs(value) ** 1.5 if isinstance(value, int | float) else value


def test_a_growth_is_found_where_it_was_put():
    at = [256, 512, 1024, 2048]
    assert scaling_figures.fit_exponent(at, [3 * x**1.5 for x in at]) == pytest.approx(1.5)
    assert scaling_figures.end_exponents(at, [2, 4, 8, 32]) == "1.00 → 2.00"
    linear, quadratic = scaling_figures.fit_quadratic(at, [5 * x + 0.25 * x**2 for x in at])
    assert (linear, quadratic) == pytest.approx((5, 0.25))  # exact, up to rounding


def test_a_ratio_is_that_of_each_round():
    """So that a machine at half its speed for a round, for both, changes nothing."""
    assert figures.median_ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == 2


def test_plain_steps_bound_a_gain_beyond_what_was_measured():
    def row(method: str, time: float, psnr: float) -> dict[str, Any]:
        return {"method": method, "time": time, "psnr_open_db": psnr}

    plain = [row("fewer steps", 0.25, 30.0), row("fewer steps", 0.75, 50.0)]
    assert figures.gain_text(plain, row("auto", 0.5, 45.0)) == "+5.0"
    assert figures.gain_text(plain, row("auto", 0.9, 45.0)) == "≤ -5.0"
    assert figures.gain_text(plain, row("auto", 0.1, 29.0)) == "≥ -1.0"


@pytest.mark.slow
def test_the_curves_are_measured_and_drawn(tmp_path):
    found, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--repeats", "3", "--output", str(found), "--plot", str(picture)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    curves = json.loads(found.read_text("utf-8"))["curves"]
    assert set(curves) == set(scaling_figures.CURVE_UNITS)
    for points in curves.values():
        for point in points:
            assert point["ways"]["prebake"]["error"] < 0.05  # int8 and bfloat16: 5e-3 here; another picture is 1
            assert all(seconds > 0 for way in point["ways"].values() for seconds in way["seconds"])
    assert all(p["ways"][w]["bytes"] > 2**20 for p in curves["blocks"] for w in scaling_figures.SCALING_WAYS)
    assert picture.stat().st_size > 10_000
