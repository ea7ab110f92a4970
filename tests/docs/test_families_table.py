"""The docs' table of what works says what the tests show, no more and no less."""

from __future__ import annotations

import pytest

from support.paths import ROOT
from support.works_table import CLAIMED, FILES, read_table, table, with_table

PAGE = ROOT / "docs" / "reference" / "families.md"
AGAIN = "`make works` writes the table anew"


def test_every_claim_of_the_tests_is_in_the_table(request):
    assert request.config.stash[CLAIMED] - read_table(PAGE.read_text("utf-8")) == set(), AGAIN


def test_every_claim_of_the_table_has_a_test(request):
    every = {path for path in (ROOT / "tests").rglob("test_*.py") if "works(" in path.read_text("utf-8")}
    if left_out := sorted(path.name for path in every - request.config.stash[FILES]):
        pytest.skip(f"needs all tests to be collected, and these were not: {', '.join(left_out)}")
    assert read_table(PAGE.read_text("utf-8")) - request.config.stash[CLAIMED] == set(), AGAIN


def test_a_table_is_read_as_it_was_written():
    found = {("sd", "inpainting"): "passed", ("flux", "a prompt"): "passed", ("sd", "a prompt"): "failed"}
    page = with_table("x\n<!-- works: begin -->\nold\n<!-- works: end -->\ny\n", found)
    assert read_table(page) == {("sd", "inpainting"), ("flux", "a prompt")}
    assert page.startswith("x\n")
    assert page.endswith("\ny\n")
    assert "old" not in page


def test_what_failed_is_said():
    assert table({("sd", "a prompt"): "failed"}).splitlines()[2] == "| a prompt | failed |"
