"""The README says what is so: its commands parse, its Python runs, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from PIL import Image

from prebake.exporter.cli import main as cli
from prebake.exporter.recipe.resolve import resolve
from support.paths import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def command_lines() -> list[list[str]]:
    """The lines of the shell blocks as words, without comments."""
    lines = (line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines())
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


PREBAKE = [words[1:] for words in command_lines() if words[0] == "prebake"]
MAKE = sorted({words[1] for words in command_lines() if words[0] == "make"})


@pytest.mark.parametrize("arguments", PREBAKE, ids=" ".join)
def test_a_shown_command_is_one_that_the_parser_takes(arguments):
    args = cli._parser().parse_args(arguments)
    recipes = getattr(args, "recipe", None) or getattr(args, "name", None) or []
    for recipe in recipes if isinstance(recipes, list) else [recipes]:
        resolve(recipe, args.overrides, args.model)


def test_every_subcommand_is_shown_as_a_command():
    commands = cli._parser()._subparsers._group_actions[0].choices
    assert set(commands) == {arguments[0] for arguments in PREBAKE}


def test_every_option_and_command_that_the_text_names_exists():
    helps = [p.format_help() for p in cli._parser()._subparsers._group_actions[0].choices.values()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL))
    options = {word for code in inline for word in re.findall(r"--[a-z][a-z-]*", code)}
    assert [option for option in sorted(options) if not any(re.search(rf"{option}\b", h) for h in helps)] == []
    named = {match[1] for code in inline if (match := re.match(r"prebake (\w+)", code))}
    assert named <= {arguments[0] for arguments in PREBAKE}


@pytest.mark.parametrize("target", MAKE)
def test_a_shown_make_target_exists(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_python_example_runs(tiny_artifact, tmp_path, monkeypatch):
    (code,) = blocks("python")
    artifact = tmp_path / re.search(r'load\("(.+)"\)', code)[1]
    artifact.parent.mkdir()
    artifact.symlink_to(tiny_artifact)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    (written,) = tmp_path.glob("*.png")
    assert Image.open(written).size == (32, 32)


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    text = (ROOT / page).read_text("utf-8")
    links = {*re.findall(r"\]\(([^)#:]+)\)", text), *re.findall(r'src="([^":]+)"', text)}
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


def test_the_changelog_starts_with_the_version_of_this_tree():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert version
    assert newest
    assert newest[1] == version[1]
