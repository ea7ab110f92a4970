"""Every command and every Python block of the pages is run, or says why it is not."""

from __future__ import annotations

import io
import itertools
import shutil
from pathlib import Path

import pytest
from PIL import Image

from prebake.exporter.recipe.resolve import resolve
from support.page_blocks import (
    BLOCKS,
    PAGES,
    ROOT,
    RUNNABLE,
    Block,
    Reader,
    blocks_of,
    command_lines,
    hooks,
    prebake_arguments,
)

pytestmark = pytest.mark.docs
SHELL = [(block, line) for block in RUNNABLE if block.language != "python" for line in command_lines(block)]
PREBAKE = [(block, arguments) for block, line in SHELL if (arguments := prebake_arguments(line))]
ARTIFACT = Path("artifacts/flux-fast-shapes")


def pages_with(*marks: str) -> list[str]:
    return sorted({block.page for block in RUNNABLE if block.mark in marks})


def typed(page: str, *marks: str) -> list[Block]:
    """The page's blocks of these marks, and the files that it says to save."""
    return [block for block in blocks_of(ROOT / page) if block.mark in marks]


@pytest.mark.parametrize(("block", "arguments"), PREBAKE, ids=lambda x: str(x) if isinstance(x, Block) else "")
def test_a_shown_command_is_one_that_the_parser_takes(block, arguments):
    args = hooks.parser().parse_args(arguments)
    recipes = getattr(args, "recipe", None) or getattr(args, "name", None) or []
    for recipe in recipes if isinstance(recipes, list) else [recipes]:
        if not recipe.endswith(".toml") and "methud" not in str(arguments):
            resolve(recipe, args.overrides, args.model)


@pytest.mark.parametrize("block", [b for b in RUNNABLE if b.language == "python"], ids=str)
def test_a_shown_python_block_compiles(block):
    compile(block.text, str(block), "exec")


def test_every_command_is_shown_somewhere():
    assert {arguments[0] for _, arguments in PREBAKE} == set(hooks.commands())


@pytest.mark.parametrize("block", [b for b in RUNNABLE if b.mark == "run by"], ids=str)
def test_a_block_that_another_test_runs_is_named_by_that_test(block):
    (test,) = (ROOT / "tests").rglob(block.reason)
    text = test.read_text("utf-8")
    names = (Path(block.page).name, Path(block.page).parent.name)
    assert any(f'"{name}"' in text or f"/{name}" in text for name in names)


def test_every_block_is_run_or_says_why_not():
    assert {block.mark for block in RUNNABLE} == {"run", "slow", "not run", "run by"}
    assert all(len(block.reason) >= 8 for block in RUNNABLE if block.mark != "run")


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Reader:
    """In an empty folder, with caches of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    return Reader()


@pytest.mark.parametrize("page", pages_with("run"))
def test_a_page_runs(page, tiny_artifact, reader):
    """With a tiny artifact in the place of the demo's."""
    blocks = [block for block in typed(page, "run") if not is_make(block)]
    shutil.copytree(tiny_artifact, ARTIFACT)
    reader.follow(blocks)
    if "app" in reader.names:
        assert Image.open(io.BytesIO(reader.asks("a+red+circle"))).size == (32, 32)


def is_make(block: Block) -> bool:
    """`make demo` and `make test` of the README, which run everything else; CI runs both."""
    return all(line.startswith("make ") for line in command_lines(block))


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory) -> Path:
    """The demo's own, as the first tutorial exports it."""
    folder = tmp_path_factory.mktemp("demo") / "flux-fast-shapes"
    assert (
        hooks.main()(["export", "--recipe", "flux-fast", "--model", "shapes", "--output", str(folder), "--quiet"]) == 0
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("slow"))
def test_a_slow_page_runs(page, demo_artifact, reader, monkeypatch):
    """All of it, with the demo's artifact. What one page compiled another one takes from the export cache."""
    blocks = [block for block in typed(page, "run", "slow") if not is_make(block)]
    monkeypatch.delenv("XDG_CACHE_HOME")
    shutil.copytree(demo_artifact, ARTIFACT)
    reader.follow(blocks)


# --- Markdown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_begin_after_an_empty_line(page):
    """GitHub does not ask for it, the site does."""
    lines = page.read_text("utf-8").splitlines()
    code = [line.lstrip().startswith("```") for line in lines]
    fenced = list(itertools.accumulate(code))
    for before, line, inside in zip(lines, lines[1:], fenced[1:], strict=False):
        if inside % 2 == 0 and line.startswith(("- ", "| ", "1. ")):
            assert not before or before.startswith(("- ", "| ", "  ", "<!--")) or before[:1].isdigit(), line


def test_no_page_is_left_out():
    assert {block.page for block in BLOCKS} <= {str(page.relative_to(ROOT)) for page in PAGES}
