"""Plans of a calibration are added as they were found where they fit, and a mask stands in for them where they do not."""

from __future__ import annotations

import pytest

from prebake.exporter.caches import Auto, Mask
from prebake.exporter.caches.common import calibration as calibrations
from prebake.exporter.caches.common.calibration import Calibration, FittedPlan
from prebake.exporter.pipeline import prepare
from prebake.exporter.plan import inputs
from prebake.exporter.progress import Progress
from prebake.exporter.recipe.resolve import change_recipe, resolve
from prebake.exporter.replan.rebuild import build_plans
from prebake.exporter.verify.source_pipeline import manifest_recipe
from prebake.runtime.artifact import open_artifact
from prebake.runtime.errors import ExportError
from prebake.runtime.manifest import read_manifest
from prebake.runtime.plan import Plan
from support.plan_additions import added, contents
from support.tiny_pipelines import OVERRIDES

pytestmark = pytest.mark.usefixtures("private_cache")


class Notes(Progress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


OTHERWISE = "11(001)"


def calibration_of(folder, **changes) -> Calibration:
    """One for the model of an artifact, at the steps, scheduler and size of its plan 8, with a plan that skips evaluation 5."""
    manifest = read_manifest(folder)
    plan = Plan.model_validate_json((folder / manifest.plans["8"]).read_bytes())
    weights = tuple({"output": (2.0, -1.0, 0.0)} if e == 5 else {} for e in range(8))
    fitted = FittedPlan(
        cost=0.875, skips=tuple("output" if w else "" for w in weights), weights=weights,
        psnr_db=40.0, held_out_psnr_db=39.0, fewer_steps=7, fewer_steps_psnr_db=20.0,
    )  # fmt: skip
    given = {
        "model": "tiny", "sha256": manifest.source.sha256, "scheduler": plan.scheduler, "steps": 8,
        "timesteps": tuple(e.timestep for e in plan.evaluations), "guidance_scale": 3.5, "prompts": 1,
        "prompts_sha256": "", "seeds": 1, "auto": (fitted,),
    }  # fmt: skip
    return Calibration(**{**given, **changes})


FOUND = Auto(calibration=calibrations.CALIBRATION_FILE, otherwise=OTHERWISE, budget=0.9)


@pytest.fixture
def found(copied):
    """The copy as if its export had used `FOUND`: one variant predicts the output from three stored ones."""
    kept = inputs.read_plan_inputs(copied, read_manifest(copied))
    output = kept.layout.output(slots=3)
    kept = kept.model_copy(update={"marks": (output,), "variants": {"full": {}, "reuse": {output.name: "combine"}}})
    (copied / inputs.PLAN_INPUTS_FILE).unlink()
    (copied / inputs.PLAN_INPUTS_FILE).write_text(kept.model_dump_json(by_alias=True), "utf-8")
    calibrations.write_calibration(copied / calibrations.CALIBRATION_FILE, calibration_of(copied))
    return copied


def planned(folder, steps: int, *overrides: str, cache: Auto = FOUND):
    """The cached plan, and what was noted."""
    manifest, notes = read_manifest(folder), Notes()
    recipe = change_recipe(manifest_recipe(folder, manifest), "recipe", overrides).model_copy(update={"cache": cache})
    return build_plans(folder, manifest, recipe, steps, notes)[0][0], notes.told


def test_a_found_plan_is_kept_at_its_own_steps(found):
    plan, notes = planned(found, 8)
    assert (plan.cache, notes) == ("auto", [])
    assert [e.variant for e in plan.evaluations] == ["full"] * 5 + ["reuse"] + ["full"] * 2
    assert plan.evaluations[5].coefficients == (2.0, -1.0, 0.0)


def test_at_other_steps_the_mask_stands_in_with_the_variants_that_are_there(found):
    plan, notes = planned(found, 6)
    assert plan.cache == "mask"
    assert [e.variant for e in plan.evaluations] == ["full", "full", "reuse", "reuse", "full", "reuse"]
    newest, before, unused = plan.evaluations[2].coefficients
    a, b, t = (plan.evaluations[e].timestep for e in (1, 0, 2))
    assert newest == pytest.approx(1 + (t - a) / (a - b))
    assert newest + before == pytest.approx(1)
    assert unused == 0
    assert len(notes) == 1
    assert (
        "calibration.json is for the timesteps of 8 steps of FlowMatchEulerDiscreteScheduler, and those of 6 steps here are "
        "others, so mask 11(001) is used for 6 steps;" in notes[0]
    )


def test_with_another_scheduler_or_model_the_mask_stands_in_too(found):
    plan, notes = planned(found, 8, "sampler.scheduler=FlowMatchLCMScheduler")
    assert (plan.cache, plan.scheduler, len(notes)) == ("mask", "FlowMatchLCMScheduler", 1)
    calibrations.write_calibration(found / calibrations.CALIBRATION_FILE, calibration_of(found, sha256="0" * 64))
    plan, notes = planned(found, 8)
    assert plan.cache == "mask"
    assert "is of the model 'tiny', and this is another one, so mask" in notes[0]


def test_without_otherwise_other_steps_are_refused(found):
    with pytest.raises(ExportError, match="made for 8 steps"):
        planned(found, 6, cache=FOUND.model_copy(update={"otherwise": None}))


def test_another_calibration_than_the_artifacts_own_is_refused(found, tmp_path):
    other = tmp_path / "other.json"
    calibrations.write_calibration(other, calibration_of(found, prompts=2))
    with pytest.raises(ExportError, match=r"other.json' is not .* that the artifact carries"):
        planned(found, 8, cache=FOUND.model_copy(update={"calibration": str(other)}))
    calibrations.write_calibration(other, calibration_of(found))
    assert planned(found, 8, cache=FOUND.model_copy(update={"calibration": str(other)}))[0].cache == "auto"


def test_the_first_calibration_of_an_artifact_goes_into_it_and_is_hashed(copied, tmp_path):
    errors = tuple((0.1,) * min(e, 3) for e in range(8))
    calibrations.write_calibration(tmp_path / "errors.json", calibration_of(copied, errors={"attn": errors}, auto=()))
    smooth = ("cache.method=smoothcache", 'cache.components_to_wrap=["attn"]', "cache.calibration_threshold=0.2")
    manifest, plans = added(copied, 8, *smooth, f"cache.calibration={tmp_path / 'errors.json'}", force=True)
    assert [e.variant for e in plans["8"].evaluations] == [
        "full",
        "reuse",
        "reuse",
        "reuse",
        "full",
        "reuse",
        "reuse",
        "full",
    ]
    assert calibrations.CALIBRATION_FILE in {entry.path for entry in manifest.files}
    assert contents(copied)[calibrations.CALIBRATION_FILE] == (tmp_path / "errors.json").read_bytes()
    open_artifact(copied)
    calibrations.write_calibration(tmp_path / "other.json", calibration_of(copied, errors={"attn": errors}, prompts=2))
    with pytest.raises(ExportError, match="export again with this one"):
        added(copied, 8, *smooth, f"cache.calibration={tmp_path / 'other.json'}", force=True)


@pytest.mark.parametrize(
    ("overrides", "cache", "notes"),
    [
        ((), Auto, 0),
        (("sampler.steps=[8,6]",), Mask, 1),
        pytest.param(("shapes.height=64", "shapes.width=64"), Mask, 1, marks=pytest.mark.slow),
        pytest.param(("sampler.scheduler=FlowMatchLCMScheduler",), Mask, 1, marks=pytest.mark.slow),
    ],
)
def test_an_export_takes_the_found_plan_only_where_all_its_timesteps_are_the_calibrations(
    tiny_artifact, tiny_folder, tmp_path, overrides, cache, notes
):
    calibrations.write_calibration(tmp_path / "found.json", calibration_of(tiny_artifact))
    told = Notes()
    found = ("cache.method=auto", "cache.calibration=found.json", f"cache.otherwise={OTHERWISE}", "cache.budget=0.9")
    recipe = resolve("flux-fast", (*OVERRIDES[1:], *found, *overrides), str(tiny_folder))
    prepared = prepare(recipe, told, near=tmp_path)
    assert isinstance(prepared.recipe.cache, cache)
    assert (prepared.calibration is None) == (cache is Mask)
    assert {p.cache for p in prepared.planned.plans} == {"none", prepared.recipe.cache.method}
    assert sum(note.startswith("cache: ") for note in told.told) == notes
