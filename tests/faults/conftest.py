"""Which tests have a row in the table of faults, and what `make faults` does."""

from pathlib import Path

import pytest

from support.fault_table import EVERY, covers, with_table

NODES = pytest.StashKey[tuple[str, ...]]()


@pytest.fixture(scope="session")
def collected(request):
    """The node ids of all tests that were collected, slow ones too."""
    return request.config.stash[NODES]


def pytest_addoption(parser):
    """Known only where this folder is named on the command line, as `make faults` does."""
    parser.addoption(
        "--faults-page", metavar="FILE", type=Path, help="run the tests of all faults, and write FILE's table"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Keeps what was collected, before slow tests are left out. To write the page, only what has a row is run."""
    config.stash[NODES] = tuple(item.nodeid for item in items)
    if config.getoption("--faults-page", None):
        items[:] = [item for item in items if any(covers(fault, item.nodeid) for fault in EVERY)]


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--faults-page", None)
    if path is None or hasattr(config, "workerinput"):
        return
    said = {"passed": "✓", "skipped": "skipped", "failed": "failed", "error": "failed"}  # the worst is said last
    found = {
        fault.id: said[outcome]
        for outcome in said
        for report in terminalreporter.stats.get(outcome, ())
        for fault in EVERY
        if covers(fault, report.nodeid)
    }
    path.write_text(with_table(path.read_text("utf-8"), found), "utf-8")
