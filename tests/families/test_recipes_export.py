"""Each family's recipe exports on its tiny model, thresholds and all, and the artifact is drawn with where there is no diffusers."""

from __future__ import annotations

import json

import pytest
from parity import FAMILIES
from slim import run

from prebake.exporter.pipeline import Options, export
from prebake.exporter.progress import progress
from prebake.exporter.recipe import resolve
from prebake.exporter.tiny import NAMES

DRAW = """
import importlib.util, json, sys
from PIL import Image
from prebake.runtime import load

pipe = load(sys.argv[1])
picture = pipe.family.settings.picture
given = {"image": Image.new("RGB", (80, 40), "teal")} if picture and picture.required else {}
(made,) = pipe("a red circle", seed=1, **given)
frames = made[0] if pipe.family.makes == "frames" else made
print(json.dumps({"sizes": [f.size for f in frames], "diffusers": importlib.util.find_spec("diffusers") is not None}))
"""


@pytest.mark.slow  # minutes each, most of them AOTInductor's
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.works(n, "recipe exports")) for n in FAMILIES])
def test_a_recipe_exports_and_draws_without_diffusers(name, slim_python, tmp_path):
    tiny, recipe = FAMILIES[name].tiny, FAMILIES[name].recipe
    with progress("quiet") as quiet:
        artifact = export(resolve(recipe, (), f"tiny:{tiny}"), tmp_path / "artifact", Options(), quiet)
    assert json.loads((artifact / "manifest.json").read_text("utf-8"))["status"] == "verified"
    done = run(slim_python, "-W", "error::UserWarning:prebake", "-c", DRAW, str(artifact), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = NAMES[tiny].defaults
    frames = size.get("num_frames", 1)
    assert json.loads(done.stdout) == {"sizes": [[size["width"], size["height"]]] * frames, "diffusers": False}
