"""Exports of a denoiser alone: what is refused, what recording leaves behind, and compiled artifacts in their pipelines."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.progress import open_progress
from prebake.exporter.verify.golden import golden_path
from prebake.exporter.verify.options import VerifyOptions
from prebake.exporter.verify.verify import verify_artifact
from prebake.runtime import ExportError, RecipeError, RequestError, attach, load
from prebake.runtime.artifact import open_artifact
from prebake.runtime.manifest import read_manifest
from support.attach_pipelines import (
    MASK,
    OTHER_PROMPT,
    PROMPT,
    Off,
    drawn,
    pipeline,
    recipe,
    same,
    uncompiled,
)
from support.paths import ROOT

# --- refusals: exports ----------------------------------------------------------------------------------------------


def test_a_loop_with_two_denoisers_is_not_exported(tmp_path):
    """Wan 2.2: from some timestep on the steps belong to another transformer."""
    pipe = pipeline("wan")
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.95)
    pipe.save_pretrained(tmp_path / "wan")
    with pytest.raises(ExportError, match="runs transformer_2 beside transformer in its loop"):
        uncompiled(recipe("wan", tmp_path / "wan"), tmp_path)


def test_arguments_that_the_pipeline_lacks_are_named(folder, tmp_path):
    with pytest.raises(RecipeError, match=r"attach.arguments: .*takes no 'speed'; it takes prompt"):
        uncompiled(recipe("aura_flow", folder("aura_flow"), attach={"arguments": {"speed": 2}}), tmp_path)


def test_the_steps_that_are_asked_for_replace_the_models_own_and_not_the_recipes():
    from prebake.exporter.denoiser_alone.observation import pipeline_request

    pipe = pipeline("wan")
    asked = pipeline_request(pipe, PROMPT, {"num_inference_steps": 8, "height": 16}, {})(2, 0)
    assert (asked["num_inference_steps"], asked["height"]) == (2, 16)
    assert pipeline_request(pipe, PROMPT, {}, {"num_inference_steps": 3})(2, 0)["num_inference_steps"] == 3


def test_a_whole_pipeline_needs_a_family(folder, tmp_path):
    model = {"id": str(folder("aura_flow")), "part": "pipeline"}
    with pytest.raises(ExportError, match="AuraFlowPipeline"):
        uncompiled(recipe("aura_flow", folder("aura_flow"), model=model), tmp_path)


def test_recording_leaves_the_pipeline_as_it_was(folder):
    from prebake.exporter.denoiser_alone.observation import pipeline_request
    from prebake.exporter.denoiser_alone.recording import record_pipeline
    from support.attach_pipelines import CALLS as ARGUMENTS

    pipe = pipeline("wan")
    eager = drawn(pipe, "wan")
    recording = record_pipeline(pipe, pipeline_request(pipe, PROMPT, {}, ARGUMENTS["wan"]), (4, 3))
    assert torch.equal(drawn(pipe, "wan"), eager)
    assert not pipe.transformer._forward_hooks
    assert {a.name: a.role for a in recording.kinds[0].arguments if a.is_input} == {
        "hidden_states": "latents",
        "timestep": "step",
        "encoder_hidden_states": "fixed",
    }
    assert [len(calls) for calls in recording.schedules[3].calls] == [2, 2, 2]


# --- compiled -------------------------------------------------------------------------------------------------------


def exported(name: str, model: Path, output: Path, **tables: Any) -> Path:
    with open_progress("quiet") as quiet:
        return export(recipe(name, model, **tables), output, ExportOptions(), quiet)


@pytest.fixture(scope="module")
def compiled(folder, tmp_path_factory) -> Callable[[str], Path]:
    """AuraFlow's denoiser with a mask, or Sana's, or Wan's with a mask, compiled and verified in its pipeline."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            output = tmp_path_factory.mktemp("compiled") / name
            cache = {"method": "none"} if name == "sana" else MASK
            made[name] = exported(name, folder(name), output, cache=cache)
        return made[name]

    return of


SLOW = {"aura_flow": (), "sana": (pytest.mark.slow,), "wan": (pytest.mark.slow,)}


def compiled_params(ability: str, *names: str) -> list[Any]:
    return [pytest.param(n, marks=(*SLOW[n], pytest.mark.works(n, ability))) for n in names]


@pytest.mark.parametrize("name", compiled_params("compiled", *SLOW))
def test_compiled_latents_are_the_pipelines_own(name, compiled):
    pipe = pipeline(name)
    eager = drawn(pipe, name, OTHER_PROMPT)
    with attach(pipe, compiled(name), cache=False):
        assert same(drawn(pipe, name, OTHER_PROMPT), eager)


@pytest.mark.parametrize("name", compiled_params("caches", "aura_flow", "wan"))
def test_compiled_caches_are_the_eager_replay_of_the_plan(name, compiled, artifact):
    pipe = pipeline(name)
    with attach(pipe, artifact(name, cache=MASK)):
        eager = drawn(pipe, name)
    with attach(pipe, compiled(name)):
        ours = drawn(pipe, name)
    assert same(ours, eager)
    assert not same(ours, drawn(pipe, name))


def test_verify_replays_without_a_pipeline(compiled):
    with open_progress("quiet") as quiet:
        manifest, outcome = verify_artifact(compiled("aura_flow"), VerifyOptions(), quiet)
    assert manifest.status == "verified"
    assert not outcome.missed
    assert [len(g.evaluations) for g in outcome.golden] == [4, 4]
    assert all(g.bitwise for g in outcome.golden)


def test_verify_with_its_pipeline_writes_the_golden_vectors_that_it_lacks(compiled, folder, tmp_path):
    made = compiled("aura_flow")
    copied = shutil.copytree(made, tmp_path / "copied")
    shutil.rmtree(copied / "golden")
    manifest = read_manifest(copied)
    left = tuple(entry for entry in manifest.files if not entry.path.startswith("golden/"))
    changed = manifest.model_copy(update={"files": left, "status": "unverified"})
    (copied / "manifest.json").write_text(changed.to_json(), "utf-8")
    with open_progress("quiet") as quiet:
        settled, outcome = verify_artifact(
            copied, VerifyOptions(with_source=True, model=str(folder("aura_flow"))), quiet
        )
    assert not outcome.missed
    assert settled == read_manifest(copied) == manifest
    for plan in manifest.plans:
        assert (copied / golden_path(plan)).read_bytes() == (made / golden_path(plan)).read_bytes()


def test_golden_vectors_notice_another_denoiser(compiled):
    from prebake.exporter.verify.denoiser_alone import replay_attached_golden

    opened = open_artifact(compiled("aura_flow"))
    wrong = replace(opened, graphs={n: Off(g) for n, g in opened.graphs.items()})
    replayed = replay_attached_golden(wrong, opened.plans["4-uncached"])
    assert not replayed.bitwise
    assert min(replayed.evaluation_errors) == pytest.approx(1e-3, rel=0.01)  # what `Off` adds


def test_load_says_to_attach(compiled):
    with pytest.raises(RequestError, match=r"denoiser of AuraFlowPipeline alone; .*runtime.attach"):
        load(compiled("aura_flow"))


def test_plan_says_to_export_again(compiled):
    from prebake.exporter.add_plan import PlanOptions as PlanChoices
    from prebake.exporter.add_plan import add_plans
    from prebake.exporter.recipe.resolve import Recipe
    from prebake.runtime.manifest import read_manifest

    asked = Recipe.model_validate(read_manifest(compiled("aura_flow")).recipe)
    with open_progress("quiet") as quiet, pytest.raises(ExportError, match="follow its pipeline's own schedule"):
        add_plans(compiled("aura_flow"), asked, 5, PlanChoices(), quiet)


@pytest.mark.slow
def test_the_page_is_right(folder, tmp_path):
    """Every block of docs/how-to/attach.md, in its order, word for word."""
    text = (ROOT / "docs" / "how-to" / "attach.md").read_text("utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["toml", "sh", "python"]
    (_, toml), (_, command), (_, code) = blocks
    (tmp_path / "sana.toml").write_text(toml, "utf-8")
    (tmp_path / "sana").symlink_to(folder("sana"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    check = "\nimport numpy\nassert not numpy.array_equal(numpy.asarray(image), numpy.asarray(exact))\n"
    for line in (["bash", "-ec", command], [sys.executable, "-c", code + check]):
        subprocess.run(line, cwd=tmp_path, env=environment, check=True, timeout=600)
