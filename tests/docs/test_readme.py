"""The README says what is so: it is short, its options exist, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess

import pytest

from support.page_blocks import ROOT, hooks

pytestmark = pytest.mark.docs
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
README = (ROOT / "README.md").read_text("utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_every_option_and_command_that_the_text_names_exists():
    helps = [one.format_help() for one in hooks.commands().values()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL))
    options = {word for code in inline for word in re.findall(r"--[a-z][a-z-]*", code)}
    assert [option for option in sorted(options) if not any(re.search(rf"{option}\b", h) for h in helps)] == []
    named = {match[1] for code in inline if (match := re.match(r"prebake (\w+)", code))}
    assert named <= set(hooks.commands())


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE))))
def test_a_shown_make_target_exists(target):
    done = subprocess.run(["make", "-n", "".join(target)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    text = (ROOT / page).read_text("utf-8")
    links = {*re.findall(r"\]\(([^)#:]+)[^):]*\)", text), *re.findall(r'src="([^":]+)"', text)}
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


def test_the_changelog_starts_with_the_version_of_this_tree():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert version
    assert newest
    assert newest[1] == version[1]
