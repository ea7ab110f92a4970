"""A backend is two modules of one name and nothing else: here is one, `tests/backends`, that no other file knows."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prebake.exporter import lower, pipeline
from prebake.exporter.cli.main import main
from prebake.exporter.package.folder import file_entries
from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.verify import verify
from prebake.runtime import backends, load
from prebake.runtime.errors import ArtifactError, ExportError, RecipeError
from prebake.runtime.manifest import read_manifest
from support.family_parity import PLAIN, TOLERANCE, expected, relative_error, seeded
from support.paths import ROOT

HERE = ROOT / "tests" / "support" / "backends"
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
    with open_progress("quiet") as quiet:
        return export(recipe, tmp_path_factory.mktemp("eager") / "artifact", ExportOptions(), quiet)


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
    with open_progress("quiet") as quiet, pytest.raises(ExportError, match=r"has no int8; set quantize\.method=none"):
        export(recipe, Path("never-written"), ExportOptions(), quiet)


def test_a_recipe_that_names_no_backend_is_told_those_there_are():
    with pytest.raises(RecipeError, match=r"backend.*expected one of aoti, .*eager.*, got 'aotinductor'"):
        resolve("flux-fast", ("compile.backend=aotinductor",), "tiny:flux")


@pytest.mark.parametrize(
    "name", ["aotinductor", "os", "__init__", "prebake.runtime.check.artifact", "../aoti", "Eager"]
)
def test_a_manifest_names_a_module_of_the_runtime_or_is_refused(artifact, tmp_path, name):
    with pytest.raises(ArtifactError, match=r"manifest.json.*backend"):
        load(with_manifest(artifact, tmp_path, backend=name))


def test_what_the_backend_lacks_is_said_before_its_files_are_opened(artifact, tmp_path):
    requires = json.loads((artifact / "manifest.json").read_text("utf-8"))["requires"]
    copied = with_manifest(artifact, tmp_path, requires=requires | {"packages": {"torch": "1.0"}})
    with pytest.raises(ArtifactError, match=r"exported with torch 1\.0, this is .*; export again"):
        load(copied)


# --- exported where it cannot run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """The same artifact as a machine leaves it that cannot run its code."""
    recipe = resolve("flux-fast", (*PLAIN, "compile.backend=eager", "verify.seeds=1"), "tiny:flux")
    with pytest.MonkeyPatch.context() as patch, open_progress("quiet") as quiet:
        patch.setattr(pipeline, "machine_problems", lambda manifest: ["needs a GPU"])
        return export(recipe, tmp_path_factory.mktemp("elsewhere") / "artifact", ExportOptions(), quiet)


@pytest.fixture
def unsettled(elsewhere, tmp_path) -> Path:
    return shutil.copytree(elsewhere, tmp_path / "artifact")


def contents(folder: Path) -> dict[str, bytes]:
    """All but reports, which are free."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith("reports/")}


def status(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text("utf-8"))["status"]


def test_an_export_that_cannot_run_here_has_no_golden_vectors_and_says_who_writes_them(unsettled, capsys):
    assert status(unsettled) == "unverified"
    assert not (unsettled / "golden").exists()
    assert main(["verify", str(unsettled), "--quiet"]) == 5
    (said,) = capsys.readouterr().err.splitlines()
    assert "there are no golden vectors to replay (plan 8)" in said
    assert f"`prebake verify {unsettled} --source` compares the artifact with its pipeline, and writes them" in said


def test_verify_where_it_can_run_makes_it_what_an_export_there_would_have_made(unsettled, artifact, capsys):
    assert main(["verify", str(unsettled), "--source", "--quiet"]) == 0
    assert [p.name for p in unsettled.parent.iterdir()] == [unsettled.name]
    ours, theirs = contents(unsettled), contents(artifact)
    assert ours.keys() == theirs.keys()
    assert {n for n in ours if ours[n] != theirs[n]} <= {"manifest.json", *graphs(artifact)}
    ours, theirs = json.loads(ours["manifest.json"]), json.loads(theirs["manifest.json"])
    assert ours | {"files": []} == theirs | {"files": []}
    assert main(["verify", str(unsettled)]) == 0
    assert "same to the bit" in capsys.readouterr().out


def graphs(folder: Path) -> list[str]:
    """Files that torch.export.save does not write alike twice."""
    return [f"graphs/{p.name}" for p in (folder / "graphs").iterdir()]


def test_an_artifact_that_misses_its_thresholds_stays_as_it_was(unsettled):
    """The canary: one weight is another, and hashes fit."""
    path = unsettled / "weights/denoiser.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("proj_out.bias"))
    save_file({**weights, name: weights[name] + 1}, path)
    manifest = read_manifest(unsettled)
    manifest = manifest.model_copy(update={"files": file_entries(unsettled)})
    (unsettled / "manifest.json").write_text(manifest.to_json(), "utf-8")
    before = contents(unsettled)
    assert main(["verify", str(unsettled), "--source", "--quiet"]) == 4
    assert contents(unsettled) == before
    assert [p.name for p in unsettled.parent.iterdir()] == [unsettled.name]


def test_a_look_at_fewer_prompts_settles_nothing(unsettled, capsys):
    before = contents(unsettled)
    assert main(["verify", str(unsettled), "--source", "--limit", "1"]) == 0
    assert "note: plan 8 has no golden vectors to replay" in capsys.readouterr().out
    assert contents(unsettled) == before


def test_a_run_that_is_interrupted_leaves_it_as_it_was(unsettled, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = contents(unsettled)
    monkeypatch.setattr(verify, "compare_with_source", interrupted)
    assert main(["verify", str(unsettled), "--source", "--quiet"]) == 130
    assert contents(unsettled) == before
    assert [p.name for p in unsettled.parent.iterdir()] == [unsettled.name]


def test_an_export_without_verification_is_settled_later(artifact, tmp_path):
    copied = with_manifest(artifact, tmp_path, status="unverified")
    assert main(["verify", str(copied), "--source", "--quiet"]) == 0
    assert contents(copied) == contents(artifact)
