"""Each family's recipe exports on its tiny model, thresholds and all, and the artifact is drawn with where there is no diffusers:
by the commands and the Python of the family's own page where it shows that model."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from prebake.exporter.cli import main as cli
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.tiny import TINY_MODELS
from support.family_parity import FAMILIES
from support.paths import ROOT
from support.slim_environment import run

PAGES = {path.stem: path.read_text("utf-8") for path in (ROOT / "docs" / "reference" / "families").glob("*.md")}
DRAW = """
import importlib.util, json, sys
from PIL import Image
from prebake.runtime import load

pipe = load(sys.argv[1])
picture = pipe.family_rules.settings.picture
given = {"image": Image.new("RGB", (80, 40), "teal")} if picture and picture.required else {}
(made,) = pipe("a red circle", seed=1, **given)
frames = made[0] if pipe.family_rules.output_kind == "frames" else made
print(json.dumps({"sizes": [f.size for f in frames], "diffusers": importlib.util.find_spec("diffusers") is not None}))
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The arguments of each `prebake` line of the page's shell blocks."""
    lines = [shlex.split(line) for block in blocks(page, "bash") for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["prebake"]]


def shown(tiny: str) -> tuple[list[list[str]], list[str]]:
    """The commands and the Python of the page that exports this tiny model; none where there is no such page."""
    for page in PAGES.values():
        if f"tiny:{tiny}" in commands(page)[0]:
            return commands(page), blocks(page, "python")
    return [], []


@pytest.mark.slow  # minutes each, most of them AOTInductor's
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.works(n, "recipe exports")) for n in FAMILIES])
def test_a_recipe_exports_and_draws_without_diffusers(name, slim_python, tmp_path, monkeypatch):
    tiny, recipe = FAMILIES[name].tiny, FAMILIES[name].recipe
    export = ["export", "--recipe", recipe, "--model", f"tiny:{tiny}", "--output", "artifacts/it", "--no-cache"]
    lines, code = shown(tiny) if shown(tiny)[0] else ([export], [])
    monkeypatch.chdir(tmp_path)
    for arguments in lines:
        assert cli.main(arguments) == 0
    (artifact,) = (tmp_path / "artifacts").iterdir()
    assert json.loads((artifact / "manifest.json").read_text("utf-8"))["status"] == "verified"
    for example in code:
        ran = run(slim_python, "-c", example, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
    done = run(slim_python, "-W", "error::UserWarning:prebake", "-c", DRAW, str(artifact), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = TINY_MODELS[tiny].defaults
    frames = size.get("num_frames", 1)
    assert json.loads(done.stdout) == {"sizes": [[size["width"], size["height"]]] * frames, "diffusers": False}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_has_an_example_of_a_tiny_model(page):
    first, *_ = commands(PAGES[page])
    args = cli._parser().parse_args(first)
    assert args.model.removeprefix("tiny:") in TINY_MODELS
    resolve(args.recipe[0], args.overrides, args.model)
    assert all(str(args.output) in code and compile(code, page, "exec") for code in blocks(PAGES[page], "python"))
    assert blocks(PAGES[page], "python")
