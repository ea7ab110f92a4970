"""README's Python, and `prebake` itself, under basedpyright, against an installed wheel: no editable install, no path of this tree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import prebake

pipe = prebake.load("artifacts/x")
pipe("a red circle", seed=7).images[0].save("circle.png")
pipe("a red circle").frames
steps: tuple[int, ...] = pipe.steps
if isinstance(pipe, prebake.VideoPipeline):
    reveal_type(pipe("a red circle"))
reveal_type(prebake.export("flux-fast", model="shapes", output="artifacts/x", overrides={"sampler.steps": [20]}, progress=True))
reveal_type(prebake.export("flux-fast", model="shapes", dry_run=True))
print(prebake.verify("artifacts/x", source=True).passed, prebake.__version__)
try:
    prebake.load("artifacts/x", trust="size")
except prebake.errors.CallerError as e:
    print(e.http_status)
"""
REVEALED = ["VideoOutput", "ExportResult", "Forecast"]
WRONG = """
import prebake
prebake.load("artifacts/x")("a red circle").imagse
prebake.export("flux-fast", dry_run=True).path
"""


@pytest.fixture(scope="module")
def said(slim_python, tmp_path_factory) -> dict[str, list[tuple[str, str]]]:
    """File name -> (severity, message) of what basedpyright says of it. README's client of the server is OpenAI's own, and is not
    installed here."""
    folder = tmp_path_factory.mktemp("typed")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    readme = "\n".join(block for block in blocks if "import openai" not in block)
    for name, code in (("readme", readme), ("use", USE), ("wrong", WRONG)):
        (folder / f"{name}.py").write_text(code, "utf-8")
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard", "include": ["."]}))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("basedpyright")), "--outputjson", "--pythonpath", str(slim_python)],
        cwd=folder,
        env={"PATH": str(Path(ROOT / ".venv" / "bin")) + ":/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, list[tuple[str, str]]] = {"readme.py": [], "use.py": [], "wrong.py": []}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        found[Path(one["file"]).name].append((one["severity"], one["message"]))
    return found


def test_readmes_python_type_checks(said):
    assert said["readme.py"] == []


def test_what_the_package_gives_type_checks(said):
    assert [message for severity, message in said["use.py"] if severity != "information"] == []
    revealed = [message for severity, message in said["use.py"] if severity == "information"]
    assert [re.search(r'is "(\w+)"', message)[1] for message in revealed] == REVEALED


def test_what_is_wrong_is_found(said):
    """The canary: without py.typed, or with a prebake that is not found, everything would pass."""
    assert len([1 for severity, _ in said["wrong.py"] if severity == "error"]) >= 2
