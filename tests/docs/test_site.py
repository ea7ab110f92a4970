"""The site builds without a warning, asks nothing of other hosts, and has every key, command, name and error of the code."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support import headless_chromium as chromium
from support.page_blocks import ROOT, hooks

pytestmark = pytest.mark.docs
FETCHED = {
    "script": "src",
    "img": "src",
    "source": "src",
    "iframe": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
}
LINKED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest", "modulepreload"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Fetches(HTMLParser):
    """What a browser asks for to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in FETCHED and FETCHED[tag] in given:
            self.found.append(given[FETCHED[tag]])
        if tag == "link" and LINKED & set(given.get("rel", "").split()):
            self.found.append(given["href"])
        self.found += given.get("srcset", "").replace(",", " ").split()
        self.found += in_styles(given.get("style", ""))


def in_styles(text: str) -> list[str]:
    """What a style sheet fetches."""
    asked = re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)
    return [one for one in asked if not one.startswith("data:")]


def remote(text: str) -> list[str]:
    page = Fetches()
    page.feed(text)
    styles = [one for style in re.findall(r"<style.*?</style>", text, re.DOTALL) for one in in_styles(style)]
    return [one for one in [*page.found, *styles] if re.match(r"(?:\w+:)?//", one)]


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > 40
    assert {str(page): found for page in pages if (found := remote(page.read_text("utf-8")))} == {}
    assert {
        s: found for s in site.rglob("*.css") if (found := [u for u in in_styles(s.read_text("utf-8")) if "//" in u])
    } == {}


def test_no_page_has_what_the_theme_would_fetch_a_script_for(site):
    assert [page for page in site.rglob("*.html") if 'class="mermaid"' in page.read_text("utf-8")] == []


def test_a_remote_font_would_be_seen():
    assert remote('<link rel="stylesheet" href="https://fonts.example/css">') == ["https://fonts.example/css"]
    assert remote('<script src="//cdn.example/x.js"></script><style>@import "https://e/x.css";</style>') == ["//cdn.example/x.js", "https://e/x.css"]  # fmt: skip
    assert remote('<img src="a.png"><a href="https://elsewhere.example">x</a>') == []


def words(site: Path, page: str) -> str:
    """The text of a page, as a reader has it."""
    text = (site / page).read_text("utf-8")
    return html.unescape(re.sub(r"<[^>]+>", "", text[text.index("<article") : text.index("</article")]))


def test_every_key_of_a_recipe_is_on_its_page(site):
    page = (site / "reference/recipe.html").read_text("utf-8")
    tables = hooks.recipe_tables()
    assert {"model", "cache", "compile", "verify"} <= set(tables)
    for table, kinds in tables.items():
        for method, kind in kinds.items():
            anchor = table if len(kinds) == 1 else f"{table}-{method}"
            section = re.search(rf'<h[23] id="{anchor}".*?(?=<h[23] |</article>)', page, re.DOTALL)
            assert section, anchor
            shown = re.findall(r"<td><code>([^<]+)</code></td>", section[0])
            assert set(kind.model_fields) <= {html.unescape(name) for name in shown}, anchor


def test_every_command_and_option_is_on_its_page(site):
    text = words(site, "reference/cli.html")
    for name, command in hooks.commands().items():
        assert f"prebake {name}" in text
        for action in command._actions:
            assert all(option in text for option in action.option_strings[-1:] if option != "--help"), (name, action)


def test_every_public_name_is_on_its_page(site):
    text = words(site, "reference/python.html")
    names = [name for name, _ in hooks.api()]
    assert [name for name in names if name not in text] == []
    assert any(name.endswith(".load") for name in names)


def test_every_error_and_exit_code_is_on_its_page(site):
    from prebake.runtime import PrebakeError

    text, codes = words(site, "reference/errors.html"), hooks.exit_codes()
    assert {"0", "2", "4", "130"} <= {code for code, _ in codes}
    assert all(f"{code}\n{meaning}" in text for code, meaning in codes)
    assert all(kind.__name__ in text for kind in [PrebakeError, *PrebakeError.__subclasses__()])


def test_the_format_is_the_specification_itself(site):
    specified = re.findall(r"^## (.+)$", (ROOT / "artifacts/README.md").read_text("utf-8"), re.MULTILINE)
    shown = re.findall(r"<h2 [^>]*>(.*?)<a", (site / "reference/artifact-format.html").read_text("utf-8"))
    assert [re.sub(r"<[^>]+>", "", one) for one in shown] == [one.replace("`", "") for one in specified]


@pytest.mark.slow  # some seconds for each page
@pytest.mark.skipif(chromium.found() is None, reason="no chromium: apt-get install chromium")
def test_no_page_is_wider_than_a_phone_or_asks_for_anything(site):
    for page in site.rglob("*.html"):
        for shown in chromium.measured(page, (390, 1280), dark=False):
            assert shown["scroll"] <= shown["width"], (page, shown["wide"])
            assert shown["images"], page
            assert [asked for asked in shown["asked"] if not asked.startswith("file:")] == []
