"""A backend is two modules of one name and nothing else: here is one, `tests/backends`, that no other file knows."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from families.parity import PLAIN, TOLERANCE, expected, relative_error, seeded

from prebake.exporter import lower
from prebake.exporter.pipeline import Options, export
from prebake.exporter.progress import progress
from prebake.exporter.recipe import resolve
from prebake.runtime import backends, load
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError

HERE = Path(__file__).parent / "backends"
PROMPT = "a red circle"


@pytest.fixture(scope="module", autouse=True)
def eager_backend():
    """The two packages also look for modules in `tests/backends`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "__path__", [*lower.__path__, str(HERE / "lower")])
        patch.setattr(backends, "__path__", [*backends.__path__, str(HERE / "opens")])
        yield
    for package in (lower, backends):
        sys.modules.pop(f"{package.__name__}.eager", None)
        vars(package).pop("eager", None)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    recipe = resolve("flux-fast", (*PLAIN, "compile.backend=eager", "verify.seeds=1"), "tiny:flux")
    with progress("quiet") as quiet:
        return export(recipe, tmp_path_factory.mktemp("eager") / "artifact", Options(), quiet)


def with_manifest(artifact: Path, folder: Path, **changes: object) -> Path:
    """A copy of the artifact, of links to its files, whose manifest says something else."""
    copied = shutil.copytree(artifact, folder / "copy", copy_function=lambda a, b: Path(b).hardlink_to(a))
    manifest = json.loads((artifact / "manifest.json").read_text("utf-8")) | changes
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return copied


def test_a_backend_of_two_modules_exports_and_is_verified(artifact):
    manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
    assert (manifest["backend"], manifest["status"]) == ("eager", "verified")
    assert manifest["requires"]["packages"] == {"torch": torch.__version__}


def test_its_latents_are_those_of_diffusers(artifact):
    got = load(artifact)(PROMPT, output_type="latent", generator=seeded(0))[0]
    theirs = expected("flux", PROMPT, generator=seeded(0))
    assert relative_error(got, theirs) < TOLERANCE
    other = expected("flux", PROMPT, generator=seeded(1))  # the canary
    assert relative_error(got, other) > 100 * TOLERANCE


def test_its_code_holds_no_weights(artifact):
    """They come from the artifact's weight files, where each is stored once."""
    for path in (artifact / "graphs").iterdir():
        assert not torch.export.load(path).state_dict


def test_what_it_cannot_do_is_refused_in_its_own_words():
    recipe = resolve("flux-fast", ("cache.method=none", "compile.backend=eager"), "tiny:flux")
    with progress("quiet") as quiet, pytest.raises(ExportError, match=r"has no int8; set quantize\.method=none"):
        export(recipe, Path("never-written"), Options(), quiet)


def test_a_recipe_that_names_no_backend_is_told_those_there_are():
    with pytest.raises(RecipeError, match=r"backend.*expected one of aoti, .*eager.*, got 'aotinductor'"):
        resolve("flux-fast", ("compile.backend=aotinductor",), "tiny:flux")


@pytest.mark.parametrize("name", ["aotinductor", "os", "__init__", "prebake.runtime.check", "../aoti", "Eager"])
def test_a_manifest_names_a_module_of_the_runtime_or_is_refused(artifact, tmp_path, name):
    with pytest.raises(ArtifactError, match=r"manifest.json.*backend"):
        load(with_manifest(artifact, tmp_path, backend=name))


def test_what_the_backend_lacks_is_said_before_its_files_are_opened(artifact, tmp_path):
    requires = json.loads((artifact / "manifest.json").read_text("utf-8"))["requires"]
    copied = with_manifest(artifact, tmp_path, requires=requires | {"packages": {"torch": "1.0"}})
    with pytest.raises(ArtifactError, match=r"exported with torch 1\.0, this is .*; export again"):
        load(copied)
