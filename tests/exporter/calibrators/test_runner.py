"""`prebake calibrate`, from eager runs to the file that an artifact carries."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from prebake.exporter.caches import Auto, DBCache
from prebake.exporter.caches.common import calibration as calibrations
from prebake.exporter.caches.common.calibration import (
    Calibration,
    DecisionShares,
    decision_parameters,
    find_calibration,
    freeze_decisions,
    read_calibration,
    require_calibration,
)
from prebake.exporter.caches.firstblock import FirstBlockCache, decision, marks
from prebake.exporter.calibrators import dbcache, firstblock, runner
from prebake.exporter.calibrators.dynamic_replay import SamplerLoop, dynamic_replay
from prebake.exporter.cli.main import main
from prebake.exporter.families import flux
from prebake.exporter.families.picture import Size
from prebake.exporter.families.registry import find_family
from prebake.exporter.pipeline import prepare, write_folder
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.settle import sampler_table
from prebake.exporter.sites.actions import flat_outputs
from prebake.exporter.sites.layout import Layout, Place
from prebake.runtime.errors import ExportError, RecipeError
from prebake.runtime.manifest import Source
from support.known_layouts import layout_of

PROMPTS = ("a red circle", "a blue square on white")
OVERRIDES = ("cache.method=firstblock", "cache.threshold=0.4", "sampler.steps=5")
QUIET = open_progress("quiet")
SIZE = flux.Size(32, 32, 8)


@pytest.fixture(scope="module")
def made(tiny_folder) -> Calibration:
    """Two prompts, two seeds, five steps, with First Block Cache deciding."""
    return runner.calibrate(resolve("flux-fast", OVERRIDES, str(tiny_folder)), PROMPTS, 2, QUIET)


@pytest.fixture
def file(made, tmp_path) -> Path:
    calibrations.write_calibration(tmp_path / "made.json", made)
    return tmp_path / "made.json"


@pytest.fixture
def arguments(tiny_folder, tmp_path, monkeypatch) -> list[str]:
    """One run of three steps, without a method, called in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\n", "utf-8")
    command = ["calibrate", "--recipe", "flux-fast", "--model", str(tiny_folder), "--steps", "3"]
    return [*command, "--prompts", "prompts.txt", "--set", "cache.method=none"]


def test_it_says_what_was_run(made, tiny_folder):
    assert (made.model, made.steps, made.prompts, made.seeds) == (tiny_folder.name, 5, 2, 2)
    assert made.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert made.guidance_scale == 3.5
    assert made.prompts_sha256 == hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()
    assert len(made.timesteps) == 5


def test_every_site_has_its_change_at_every_evaluation(made, tiny_pipe):
    size = SIZE
    layout = layout_of(flux.denoiser(tiny_pipe, size))
    sites = {p.site for p in layout.of("attention", "feed_forward", "block")}
    assert set(made.changes) == {*sites, "blocks[0:3]", "output"}
    for values in made.changes.values():
        assert [v is None for v in values] == [True, False, False, False, False]
    assert set(made.magnitudes) == {""}
    assert made.magnitudes[""][0] == 1.0
    assert set(made.errors) == {"attn", "ff", "ff_context"} | {p.site for p in layout.of("attention", "feed_forward")}
    for rows in made.errors.values():
        assert [len(row) for row in rows] == [0, 1, 2, 3, 3]


def test_changes_are_those_of_diffusers_own_runs_averaged(made, tiny_pipe):
    block, change = tiny_pipe.transformer.single_transformer_blocks[0].attn, {"attn": [], "output": []}
    for prompt, seed in ((PROMPTS[0], 0), (PROMPTS[0], 2), (PROMPTS[1], 1), (PROMPTS[1], 3)):
        seen: dict[str, list] = {"attn": [], "output": []}
        hooks = [
            module.register_forward_hook(lambda m, args, y, to=to: to.append(flat_outputs(y)[0].clone()))
            for module, to in ((block, seen["attn"]), (tiny_pipe.transformer, seen["output"]))
        ]
        flux.draw(tiny_pipe, prompt, seed, 5, 3.5, SIZE)
        for hook in hooks:
            hook.remove()
        for name, ys in seen.items():
            change[name].append([
                float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(ys)
            ])  # fmt: skip
    for name, site in (("attn", "single_transformer_blocks.0.attn"), ("output", "output")):
        means = [fmean(values) for values in zip(*change[name], strict=True)]
        # the scheduler's own loop adds up in another order
        assert made.changes[site][1:] == pytest.approx(means, rel=1e-3)


@pytest.mark.parametrize(("kind", "guidance"), [("flux", 3.5), ("sd", 3.0), ("sd", 1.0)])
def test_runs_start_and_end_where_diffusers_own_do(request, kind, guidance):
    pipe = request.getfixturevalue("tiny_pipe" if kind == "flux" else "tiny_sd_pipe")
    family = find_family(pipe)
    size = Size(*(family.defaults(pipe)[n] for n in ("height", "width", "max_sequence_length")))
    size = SIZE if kind == "flux" else size
    table, denoiser = sampler_table(family, pipe, size, 3, QUIET), family.denoiser(pipe, size)
    (run,) = runner.draw_runs(family, pipe, size, table, ("a red circle",), 1, guidance)
    scale = family.facts(pipe, size)["timestep_scale"]
    loop = SamplerLoop(table, run.inputs, run.latents, timestep_scale=scale, noise=run.noise)
    with torch.no_grad():
        for _ in table.updates:
            call = loop.inputs()
            loop.advance(denoiser.module(*(call[n] for n in denoiser.inputs)))
    final, _ = family.draw(pipe, "a red circle", 0, 3, guidance, size)
    # float32; the scheduler's own loop and guidance add up in another order
    assert torch.allclose(loop.latents, final, rtol=0, atol=1e-5 * float(final.abs().max()))


def test_decisions_are_the_share_of_runs_that_computed(made, tiny_pipe):
    size, cache = SIZE, FirstBlockCache(threshold=0.4)
    denoiser = flux.denoiser(tiny_pipe, size)
    layout, table = layout_of(denoiser), sampler_table(flux, tiny_pipe, size, 5, QUIET)
    computed = []
    for prompt, seed in ((PROMPTS[0], 0), (PROMPTS[0], 2), (PROMPTS[1], 1), (PROMPTS[1], 3)):
        run = dynamic_replay(
            denoiser, marks(cache, layout), firstblock.probes(cache, layout), firstblock.OnlineRule(cache, layout, table),
            lambda history: decision(cache, layout, history), table, flux.encode(tiny_pipe, size, prompt, 3.5),
            flux.noise(tiny_pipe, size, torch.Generator().manual_seed(seed)), timestep_scale=1e-3,
        )  # fmt: skip
        computed.append([d[""] for d in run.decisions])
    assert made.decisions["firstblock"].parameters == {"threshold": 0.4}
    assert made.decisions["firstblock"].computed[""] == tuple(map(fmean, zip(*computed, strict=True)))
    assert 0 < sum(map(sum, computed)) < 20  # some were skipped


def test_the_same_runs_give_the_same_bytes_and_the_file_gives_them_back(made, file, tiny_folder):
    again = runner.calibrate(resolve("flux-fast", OVERRIDES, str(tiny_folder)), PROMPTS, 2, QUIET)
    assert again.to_json() == made.to_json() == file.read_text("utf-8")
    assert read_calibration(file) == made
    data = json.loads(file.read_text("utf-8"))
    assert list(data) == sorted(data)
    assert sorted(file.parent.iterdir()) == [file]


def test_a_file_that_is_no_calibration_is_refused(file):
    data = json.loads(file.read_text("utf-8"))
    for change, match in (
        ({"schema_version": 2}, r"made\.json \[schema_version\]"),
        ({"steps": "five"}, r"made\.json \[steps\]"),
        ({"colour": 1}, r"made\.json \[colour\]"),
        (
            {"changes": {"a": [0.5]}},
            r"made\.json: changes\['a'\]: expected an entry for each of the 5 timesteps, got 1; make it again with ",
        ),
    ):
        file.write_text(json.dumps({**data, **change}), "utf-8")
        with pytest.raises(RecipeError, match=match):
            read_calibration(file)
    with pytest.raises(RecipeError, match=r"none\.json: expected a calibration"):
        read_calibration(file.with_name("none.json"))


@pytest.mark.parametrize("shorter", ["changes", "magnitudes", "errors", "decisions", "skips", "weights"])
def test_everything_has_an_entry_for_each_evaluation(made, shorter):
    fitted = {"cost": 0.6, "skips": [""] * 5, "weights": [{}] * 5, "psnr_db": 40.0, "held_out_psnr_db": 39.0}
    data = made.model_dump() | {"auto": [fitted | {"fewer_steps": 3, "fewer_steps_psnr_db": 30.0}]}
    assert Calibration.model_validate(data).auto
    part = {"decisions": data["decisions"]["firstblock"]["computed"], "skips": data["auto"][0]}.get(shorter)
    part = data["auto"][0] if shorter == "weights" else data[shorter] if part is None else part
    key = shorter if shorter in part else next(iter(part))
    part[key] = part[key][:-1]
    with pytest.raises(ValidationError, match=rf"{shorter}.*: .* each of the 5 timesteps, got 4"):
        Calibration.model_validate(data)


def test_a_plan_computes_where_the_quorum_did(made):
    cache = FirstBlockCache(threshold=0.4)
    shares = DecisionShares(parameters=decision_parameters(cache), computed={"": (1.0, 0.75, 0.5, 0.25, 0.0)})
    voted = made.model_copy(update={"decisions": {"firstblock": shares}})

    def computed(quorum: float) -> list[bool]:
        chosen = cache.model_copy(update={"quorum": quorum})
        return [d[""] for d in freeze_decisions(voted, chosen, ("",), made.timesteps)]

    assert computed(0.5) == [True, True, True, False, False]
    assert computed(0.8) == [True, False, False, False, False]
    assert computed(0.1) == [True, True, True, True, False]


def test_the_file_is_found_beside_the_recipe_then_here_then_among_those_that_ship(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(RecipeError, match=r"cache\.calibration: no file 'x\.json' .*; make one"):
        find_calibration("x.json", beside)
    (here / "x.json").touch()
    assert find_calibration("x.json", beside).resolve() == here / "x.json"
    (beside / "x.json").touch()
    assert find_calibration("x.json", beside) == beside / "x.json"
    assert find_calibration("x.json", None).resolve() == here / "x.json"
    assert find_calibration("baseline.toml", beside).name == "baseline.toml"


def load_checked(cache, source, file, size):
    calibration = calibrations.load_calibration(cache, file.parent)
    calibrations.check_calibration(calibration, cache.calibration, source, size)
    return calibration


def test_a_calibration_of_another_model_is_refused(file):
    other = Source(model="other", pipeline="FluxPipeline", sha256="f" * 64)
    cache = FirstBlockCache(calibration=file.name)
    with pytest.raises(RecipeError, match=r"of model 'model' .*, and this is 'other' with ffffffffffff"):
        load_checked(cache, other, file, SIZE)


def test_a_calibration_of_another_size_is_refused(made, file):
    assert (made.height, made.width) == (SIZE.height, SIZE.width)
    source = Source(model=made.model, pipeline="FluxPipeline", sha256=made.sha256)
    cache = FirstBlockCache(calibration=file.name)
    assert load_checked(cache, source, file, SIZE) == made
    wider = replace(SIZE, width=2 * SIZE.width)
    with pytest.raises(RecipeError, match=rf"at width {SIZE.width}, .*{wider.width}; set shapes\.width"):
        load_checked(cache, source, file, wider)
    unsaid = made.model_copy(update={"height": None, "width": None})
    calibrations.write_calibration(file, unsaid)
    assert load_checked(cache, source, file, wider) == unsaid


def test_a_calibration_without_fitted_plans_says_so(made):
    with pytest.raises(ExportError, match=r"has no fitted plans, which method 'auto' needs"):
        require_calibration(made, Auto(), made.timesteps, "auto")


def test_an_artifact_carries_the_calibration_that_its_plan_rests_on(made, file, tiny_folder, tmp_path):
    recipe = resolve("flux-fast", (*OVERRIDES, f"cache.calibration={file.name}"), str(tiny_folder))
    prepared = prepare(recipe, QUIET, near=file.parent)
    cached = prepared.planned.plans[0]
    assert [e.variant == "full" for e in cached.evaluations] == [
        share >= 0.5 for share in made.decisions["firstblock"].computed[""]
    ]
    folder = tmp_path / "artifact"
    folder.mkdir()
    paths = {g.name: f"graphs/{g.name}" for group in prepared.graphs.values() for g in group}
    manifest = write_folder(folder, prepared, paths, QUIET)
    assert read_calibration(folder / "calibration.json") == made
    (entry,) = (f for f in manifest.files if f.path == "calibration.json")
    assert entry.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest.recipe["cache"]["calibration"] == "calibration.json"


def test_other_steps_than_the_calibrations_are_refused(file, tiny_folder):
    recipe = resolve("flux-fast", (*OVERRIDES, "sampler.steps=7", f"cache.calibration={file.name}"), str(tiny_folder))
    with pytest.raises(ExportError, match=r"made for 5 steps .*, and the plan has 7 evaluations"):
        prepare(recipe, QUIET, near=file.parent)


def test_the_command_writes_one_file_and_its_picture(arguments, tmp_path, capsys):
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["calibration"] == "flux-fast.calibration.json"
    calibrated = read_calibration(tmp_path / result["calibration"])
    assert (calibrated.steps, calibrated.prompts, calibrated.seeds, calibrated.decisions) == (3, 1, 1, {})
    assert Image.open(tmp_path / result["picture"]).format == "PNG"

    assert main([*arguments, "--quiet"]) == 2
    assert "flux-fast.calibration.json: already exists" in capsys.readouterr().err
    (tmp_path / "own").mkdir()
    own = tmp_path / "own" / "own.toml"
    own.write_text('name = "own"\ndescription = "d"\n[model]\nid = "x"\n', "utf-8")
    assert main([*arguments[:2], str(own), *arguments[3:], "--quiet"]) == 0
    assert read_calibration(own.with_name("own.calibration.json")) == calibrated
    assert {f.name for f in tmp_path.iterdir()} == {
        "prompts.txt", "own", "flux-fast.calibration.json", "flux-fast.calibration.png"
    }  # fmt: skip


def test_of_one_evaluation_there_is_nothing_to_draw(arguments, tmp_path, capsys):
    (tmp_path / "one.png").write_bytes(b"the picture of another calibration")
    assert main([*arguments, "--steps", "1", "--output", "one.json", "--force", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"calibration", "seconds"}
    assert read_calibration(tmp_path / "one.json").steps == 1
    assert not (tmp_path / "one.png").exists()


@pytest.fixture
def no_runs(monkeypatch):
    """A calibration that comes to its first run fails."""
    monkeypatch.setattr(runner, "draw_runs", lambda *args: pytest.fail("the model was run"))


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("x.png", "x.png: is the name of its picture; name a file"),
        ("folder", "folder: is a folder; name a file"),
        (".", "is a folder; name a file"),
        ("there.json", "there.json: already exists"),
        ("drawn.json", "drawn.png: already exists"),
        ("there.json/x.json", "there.json/x.json: cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_model_runs(
    arguments, no_runs, output, sentence, tmp_path, capsys
):
    (tmp_path / "folder").mkdir()
    for name in ("there.json", "drawn.png"):
        (tmp_path / name).touch()
    assert main([*arguments, "--output", output, "--quiet"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_that_is_not_there_yet_is_made(arguments, tmp_path):
    assert main([*arguments, "--output", "new/folder/x.json", "--quiet"]) == 0
    assert {f.name for f in (tmp_path / "new" / "folder").iterdir()} == {"x.json", "x.png"}


@pytest.mark.parametrize(
    ("cache", "sentence"),
    [
        (("cache.method=auto", "cache.candidates=['output','blocks[9:]']"), r"'blocks\[9:\]' selects nothing"),
        (("cache.method=dbcache",), r"cache\.Fn_compute_blocks 8 .* always run"),
    ],
)
def test_what_the_model_lacks_is_refused_before_it_runs(no_runs, tiny_folder, cache, sentence):
    recipe = resolve("flux-fast", ("sampler.steps=5", *cache), str(tiny_folder))
    with pytest.raises(ExportError, match=sentence):
        runner.calibrate(recipe, PROMPTS, 1, QUIET)


@pytest.mark.parametrize(("method", "online"), [("firstblock", firstblock.OnlineRule), ("dbcache", dbcache.OnlineRule)])
def test_blocks_that_continue_another_stream_are_refused(method, online):
    layout = Layout(tuple(Place(f"blocks.{i}", "", f"m.blocks.{i}", "block", ("", "x")) for i in range(9)))
    cache = {"firstblock": FirstBlockCache(), "dbcache": DBCache()}[method]
    with pytest.raises(ExportError, match=rf"'{method}' looks at .*m\.blocks\.[07] .* continues x;"):
        online(cache, layout, None)


def test_a_model_without_prompts_of_its_own_needs_some(tiny_folder, capsys):
    assert main(["calibrate", "--recipe", "flux-fast", "--model", str(tiny_folder), "--quiet"]) == 2
    assert "brings no prompts; give some with --prompts FILE, one a line" in capsys.readouterr().err
    assert len(runner.choose_prompts("shapes", None)) == 64
