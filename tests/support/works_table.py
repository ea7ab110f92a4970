"""The docs' table of families and what works, made from the tests themselves.

A test carries `@pytest.mark.works(family, ability)`; `pytest -m works --works-table=docs/reference/families.md` writes what passed into
that page, between its two comments. `tests/docs/test_families_table.py` holds the page to the tests that exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

BEGIN, END = "<!-- works: begin -->", "<!-- works: end -->"
CLAIMED = pytest.StashKey[frozenset[tuple[str, str]]]()
FILES = pytest.StashKey[frozenset[Path]]()
Claims = Mapping[tuple[str, str], str]
"""(family, ability) -> how its tests ended: passed, failed or skipped."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--works-table", metavar="FILE", type=Path, help="write what works into the table of FILE")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks travel with the reports, from a worker's process too. What is claimed is kept before slow tests are left out."""
    for item in items:
        item.user_properties += [("works", mark.args) for mark in item.iter_markers("works")]
    config.stash[CLAIMED] = frozenset(m.args for item in items for m in item.iter_markers("works"))
    config.stash[FILES] = frozenset(item.path for item in items)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    path = config.getoption("--works-table")
    if path is None or hasattr(config, "workerinput"):
        return
    found: dict[tuple[str, str], str] = {}
    for outcome in ("passed", "skipped", "failed", "error"):  # the worst is said last
        for report in terminalreporter.stats.get(outcome, ()):
            for name, value in getattr(report, "user_properties", ()):
                if name == "works":
                    found[tuple(value)] = outcome
    path.write_text(with_table(path.read_text("utf-8"), found), "utf-8")


def with_table(page: str, claims: Claims) -> str:
    """The page with the table between its comments."""
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{table(claims)}{END}", page, flags=re.DOTALL
    )


def table(claims: Claims) -> str:
    """A row for each ability, a column for each family: ✓ passed, otherwise what happened instead."""
    families, abilities = (list(dict.fromkeys(pair[k] for pair in sorted(claims))) for k in (0, 1))
    abilities.sort(key=lambda a: (-sum((f, a) in claims for f in families), a))
    said = {"passed": "✓"}
    rows = [["", *families], ["---", *(":-:" for _ in families)]]
    rows += [[a, *(said.get(claims.get((f, a), ""), claims.get((f, a), "")) for f in families)] for a in abilities]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read_table(page: str) -> set[tuple[str, str]]:
    """(family, ability) of every ✓ in the page."""
    lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {
        (family, row[0]) for row in rows[2:] for family, cell in zip(rows[0][1:], row[1:], strict=True) if cell == "✓"
    }
