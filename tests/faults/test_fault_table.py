"""The table of faults, its page, and the tests that there are agree."""

import pytest

from support.fault_table import EVERY, FAULTS, covers, read_outcomes, table, with_table
from support.paths import ROOT

TESTS = ROOT / "tests"
PAGE = TESTS.parent / "docs" / "reference" / "faults.md"
AGAIN = "`make faults` writes the page anew"


def test_the_page_is_written_from_the_table():
    page = PAGE.read_text("utf-8")
    assert with_table(page, {}) == page, AGAIN


def test_every_row_of_the_page_has_passed():
    assert read_outcomes(PAGE.read_text("utf-8")) == {fault.id: "✓" for fault in EVERY}, AGAIN


def test_every_row_has_a_name_of_its_own():
    assert len({fault.id for fault in EVERY}) == len(EVERY)


def test_every_row_has_a_test(collected):
    files = {node.removeprefix("tests/").partition("::")[0] for node in collected}
    lacking = {fault.test.partition("::")[0] for fault in EVERY} - files
    if lacking:
        pytest.skip(f"needs all tests to be collected, and these were not: {', '.join(sorted(lacking))}")
    assert [fault.id for fault in EVERY if not any(covers(fault, node) for node in collected)] == []


def test_every_test_of_this_folder_has_a_row(collected):
    here = [node for node in collected if node.startswith("tests/faults/") and "test_fault_table" not in node]
    if not here:
        pytest.skip("needs the tests of this folder to be collected, and only this file was")
    assert [node for node in here if not any(covers(fault, node) for fault in EVERY)] == []


def test_a_page_is_read_as_it_was_written():
    outcomes = {fault.id: "failed" if i % 3 else "✓" for i, fault in enumerate(EVERY)}
    page = with_table("x\n<!-- faults: begin -->\nold\n<!-- faults: end -->\ny\n", outcomes)
    assert read_outcomes(page) == outcomes
    assert page.startswith("x\n")
    assert page.endswith("<!-- faults: end -->\ny\n")
    assert "\nold\n" not in page
    assert sum(line.startswith("## ") for line in table({})) + sum("\n## " in line for line in table({})) == len(FAULTS)
