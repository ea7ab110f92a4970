"""A process that replays an artifact needs what a plain install brings, and no more. `slim_environment.py` makes the environment."""

from __future__ import annotations

import re
import subprocess
import zipfile

import pytest
from PIL import Image

from support.paths import ROOT
from support.slim_environment import FOLDERS, required, run

RUN = "import sys; from prebake.exporter.cli.main import main; sys.exit(main())"


def test_a_plain_install_requires_no_model_library_and_no_compiler():
    assert required("prebake") >= {"torch", "numpy", "safetensors", "tokenizers", "pillow", "pydantic"}
    assert required("prebake") & {"diffusers", "transformers", "torchao", "accelerate", "rich", "scikit-image"} == set()
    assert required("prebake", "export") >= {"diffusers", "transformers", "torchao"}


def test_the_wheel_has_every_file_of_the_folders(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("needs git and a clone, to know which files belong to the project")
    assert [file for file in tracked.stdout.split() if f"prebake/{file.removeprefix('api/')}" not in packed] == []


@pytest.mark.parametrize("module", ["diffusers", "transformers", "torchao", "accelerate"])
def test_the_slim_environment_cannot_import(module, slim_python, tmp_path):
    done = run(slim_python, "-c", f"import {module}", cwd=tmp_path)
    assert f"No module named '{module}'" in done.stderr


@pytest.mark.parametrize("how", [["-c", RUN], ["-m", "prebake.exporter"], ["-m", "prebake.runtime"]])
def test_run_draws_a_picture_in_the_slim_environment(how, slim_python, tiny_artifact, tmp_path):
    done = run(slim_python, *how, "run", str(tiny_artifact), "a red circle", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "image.png").size == (32, 32)


def test_run_guides_a_unet_in_the_slim_environment(slim_python, tiny_sd_artifact, tmp_path):
    done = run(slim_python, "-c", RUN, "run", str(tiny_sd_artifact), "a red circle", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "image.png").size == (32, 32)


def test_inspect_works_in_the_slim_environment(slim_python, tiny_artifact, tmp_path):
    done = run(slim_python, "-c", RUN, "inspect", str(tiny_artifact), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FluxPipeline" in done.stdout


def test_push_and_pull_work_in_the_slim_environment(slim_python, tiny_artifact, tmp_path):
    for command in (["push", str(tiny_artifact), "there"], ["pull", "there", "here", "--json"]):
        done = run(slim_python, "-m", "prebake.runtime", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    names = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (tiny_artifact, tmp_path / "here")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("half", "opener"), [("exporter.lower", "load_backend"), ("runtime.backends", "backend_module")]
)
def test_a_backend_that_lacks_its_library_names_its_extras(half, opener, slim_python, tmp_path):
    """By the metadata of an installed prebake, which has no list of backends."""
    hidden = "import sys; sys.modules['onnxruntime'] = None"
    done = run(
        slim_python, "-c", f"{hidden}; from prebake.{half} import {opener}; {opener}('onnxruntime')", cwd=tmp_path
    )
    assert re.search(
        r"needs the package (onnx|onnxruntime), which is not installed; pip install 'prebake\[(export|ort)\]'",
        done.stderr,
    )


def test_export_in_the_slim_environment_names_the_extra(slim_python, tmp_path):
    done = run(slim_python, "-c", RUN, "export", "--recipe", "baseline", "--model", "shapes", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("prebake: error: `prebake export` needs ")
    assert done.stderr.endswith(": pip install 'prebake[export]'\n")
    assert list(tmp_path.glob("artifacts/*")) == []
