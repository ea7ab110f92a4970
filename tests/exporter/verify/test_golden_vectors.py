"""Golden vectors: an export writes them, a replay holds them to the bit, and damage is noticed."""

import shutil
from dataclasses import replace
from math import inf, nan

import pytest
import torch
from safetensors.torch import load_file, save_file

from prebake.exporter.cli.main import main
from prebake.exporter.progress import Progress
from prebake.exporter.recipe.resolve import Recipe
from prebake.exporter.verify import golden
from prebake.exporter.verify.golden import TOLERANCES, GoldenReplay, replay_golden, tolerance_of
from prebake.exporter.verify.options import VerifyOptions
from prebake.exporter.verify.replayer import Replayer
from prebake.exporter.verify.verify import verify_artifact, write_golden
from prebake.runtime.artifact import open_artifact
from prebake.runtime.errors import ArtifactError, ExportError
from prebake.runtime.manifest import read_manifest
from support.verification import PROMPTS, asking, rewrite_manifest


def test_export_ships_a_golden_file_for_each_plan(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    assert sorted(manifest.plans) == ["8", "8-uncached"]
    assert {f"golden/{plan}.safetensors" for plan in manifest.plans} <= {entry.path for entry in manifest.files}
    stored = load_file(tiny_artifact / "golden/8.safetensors")
    assert stored["outputs"].shape == (8, *stored["final_latents"].shape[1:])
    assert stored["outputs"].dtype == torch.float32
    assert stored["image"].shape == (32, 32, 3)
    assert stored["image"].dtype == torch.uint8
    assert stored["input_ids.0.input_ids_2"].shape == (1, 8)


def test_golden_files_are_the_same_bytes_each_time(tiny_artifact, tiny_folder, copied):
    """Same artifact, same golden vectors: nothing in them comes from the clock or the order of a hash table."""
    shutil.rmtree(copied / "golden")
    rewrite_manifest(copied)
    manifest = write_golden(copied, *asking(copied, tiny_folder, prompts=()))
    for plan in manifest.plans:
        name = f"golden/{plan}.safetensors"
        assert (copied / name).read_bytes() == (tiny_artifact / name).read_bytes()


def test_replay_on_the_same_machine_is_the_same_to_the_bit(replayer):
    for plan in replayer.artifact.plans.values():
        replayed = replay_golden(replayer, plan)
        assert replayed.bitwise
        assert replayed.problems == ()
        assert replayed.evaluation_errors == (0.0,) * 8


def test_replay_fails_when_one_byte_of_the_weights_has_changed(copied):
    """The canary of the golden vectors: hashes are made to fit, so that nothing but the numbers can tell."""
    path = copied / "weights/denoiser.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("proj_out.bias") and weights[n].numel() == 16)
    damaged = weights[name].clone()
    highest = damaged.dtype.itemsize - 1  # of the first number, which is now between 2 and 8
    damaged.view(torch.uint8)[highest] = 0x40
    save_file({**weights, name: damaged}, path)
    rewrite_manifest(copied)

    _, outcome = verify_artifact(copied, VerifyOptions(), Progress())
    assert len(outcome.missed) >= 2
    assert outcome.missed[0].startswith("golden replay of plan '8': denoiser outputs are off by ")
    assert "0.05 is allowed; " in outcome.missed[0]
    assert main(["verify", str(copied), "--quiet"]) == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"evaluation_errors": (0.0, nan)}, "denoiser outputs are off by nan (relative, L2), 0.001 is allowed; export again on this machine"),
        ({"evaluation_errors": (0.0, 0.002)}, "denoiser outputs are off by 0.002 (relative, L2), 0.001 is allowed; export again on this machine"),
        ({"embeddings_relative_error": inf}, "embeddings are off by inf (relative, L2), 0.001 is allowed; export again on this machine"),
        ({"final_latents_relative_error": 0.5}, "final latents are off by 0.5 (relative, L2), 0.001 is allowed; export again on this machine"),
        ({"image_psnr_db": 59.0}, "the picture has 59.0 dB against the stored one, 60 are asked for; export again on this machine"),
        ({"input_ids_equal": False}, "the tokenizers give other ids than at export; restore tokenizers/, or install the exporter's version of tokenizers"),
        ({"initial_latents_equal": False}, "torch draws other noise from seed 0 than at export, so the rest cannot be compared; use the exporter's torch"),
    ],
)  # fmt: skip
def test_replay_says_what_differs(change, text):
    same = GoldenReplay("4", (0, 1), (0.0, 0.0), 0.0, True, True, 0.0, 120.0, True, TOLERANCES["float32"])
    assert same.problems == ()
    assert replace(same, **change).problems == (f"golden replay of plan '4': {text}",)


def test_golden_files_stay_under_their_cap(replayer, monkeypatch):
    """What does not fit in float32 is kept in float16, and evenly spaced evaluations of it, first and last among them."""
    drawn = replayer.draw(PROMPTS[0], 0, replayer.artifact.plans["8"])
    one = drawn.latents.numel()
    monkeypatch.setattr(golden, "GOLDEN_BYTES", one * 4 * 8)
    assert golden.golden_evaluations(replayer, drawn) == (list(range(8)), torch.float32)
    monkeypatch.setattr(golden, "GOLDEN_BYTES", one * 2 * 8)
    assert golden.golden_evaluations(replayer, drawn) == (list(range(8)), torch.float16)
    monkeypatch.setattr(golden, "GOLDEN_BYTES", one * 2 * 3)
    assert golden.golden_evaluations(replayer, drawn) == ([0, 3, 7], torch.float16)


def test_values_that_are_not_finite_are_refused(replayer):
    drawn = replayer.draw(PROMPTS[0], 0, replayer.artifact.plans["8"])
    broken = [
        replace(c, outputs={"sample": c.outputs["sample"] * inf}) if c.graph == "full" else c for c in drawn.calls
    ]
    with pytest.raises(ExportError, match=r"plan '8', evaluation 0 .* set precision.denoiser"):
        golden.check_finite(replayer.evaluations(replace(drawn, calls=tuple(broken))), "8")


def test_artifact_without_golden_vectors_is_refused(copied):
    shutil.rmtree(copied / "golden")
    rewrite_manifest(copied)
    with pytest.raises(
        ArtifactError,
        match=r"no golden .*\(plan 8, 8-uncached\); `prebake verify .* --source`",
    ):
        verify_artifact(copied, VerifyOptions(), Progress())


def test_tolerance_is_that_of_the_coarsest_arithmetic(tiny_artifact, monkeypatch):
    manifest = read_manifest(tiny_artifact)
    monkeypatch.setattr(golden, "cpu_flags", lambda: {"avx2"})
    machine = manifest.requires.model_copy(update={"machine": "x86_64"})
    graphs = {
        kernels: (manifest.graph("full").model_copy(update={"kernels": dict(kernels)}),)
        for kernels in ((), (("packed_w8a8", 4),))
    }
    plain, own = (manifest.model_copy(update={"requires": machine, "graphs": g}) for g in graphs.values())
    assert tolerance_of(plain).way_out == golden.NO_VNNI_HINT
    assert tolerance_of(own) is TOLERANCES["int8"]  # own kernels add exactly
    monkeypatch.setattr(golden, "cpu_flags", lambda: {"avx512_vnni"})
    assert tolerance_of(manifest) is TOLERANCES["int8"]
    halves = {**manifest.recipe, "precision": {**manifest.recipe["precision"], "vae": "bfloat16"}}
    assert tolerance_of(manifest.model_copy(update={"layers": {}, "recipe": halves})) is TOLERANCES["bfloat16"]
    assert tolerance_of(manifest.model_copy(update={"layers": {}, "recipe": {}})) is TOLERANCES["float32"]


def test_a_golden_file_of_a_long_plan_has_its_opening(replayer, copied, monkeypatch):
    """Of a plan that is too long to draw whole: enough steps for each variant, and the picture of the latents there."""
    from prebake.exporter.verify import budget

    monkeypatch.setattr(budget, "WHOLE_EVALUATIONS", 2)
    plan = replayer.artifact.plans["8-uncached"]
    steps = budget.count_opening_steps(plan)
    assert steps == 4
    shutil.rmtree(copied / "golden")
    rewrite_manifest(copied)
    own = Replayer(open_artifact(copied))
    golden.write_plan_golden(own, Recipe.model_validate(own.artifact.manifest.recipe), plan.name)
    stored = load_file(copied / f"golden/{plan.name}.safetensors")
    assert stored["steps"].tolist() == [4]
    assert stored["evaluations"].tolist() == [0, 1, 2, 3]
    replayed = replay_golden(own, plan)
    assert replayed.bitwise
    assert replayed.problems == ()
    whole = replayer.draw(PROMPTS[0], 0, plan)
    assert not torch.equal(whole.latents, stored["final_latents"])


@pytest.mark.parametrize("steps", [torch.tensor([9]), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([2])])
def test_steps_of_a_golden_file_that_cannot_be_are_refused(replayer, monkeypatch, steps):
    plan = replayer.artifact.plans["8"]
    stored = golden.read_golden(replayer.artifact, "8")
    monkeypatch.setattr(golden, "read_golden", lambda *_: {**stored, "steps": steps})
    with pytest.raises(ArtifactError, match=r"golden/8.*'steps'"):
        replay_golden(replayer, plan)
