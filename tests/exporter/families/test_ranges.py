"""Ranges of sizes, of every family that has them, beside diffusers: one set of graphs draws sizes that it was not traced at."""

from __future__ import annotations

import pytest
import torch

from prebake.exporter.families import flux as exported_flux
from prebake.exporter.lower import aoti
from prebake.exporter.plan.sampler import tabulate_scheduler
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.replan.rebuild import build_plans
from prebake.runtime import RequestError
from prebake.runtime.check.artifact import plan_problems, range_problems
from prebake.runtime.errors import ExportError, RecipeError
from prebake.runtime.families import flux
from support.family_parity import (
    FAMILIES,
    FLOAT32,
    PICTURE,
    PLAIN,
    PROMPTS,
    TOLERANCE,
    eager,
    expected,
    got,
    ours,
    relative_error,
    seeded,
)

UNITS = {"flux": 16, "flux-schnell": 16, "sd": 16, "sd2": 16, "sdxl": 16, "sd3": 16}
"""Pixels by which the tests' ranges go, two of them at least."""
SIZES = ((3, 4), (4, 2), (3, 3))
"""Height and width in units; the default of every tiny model is 32 x 32 pixels."""
QUICK = ("flux", "sd")
SHIFTED = ("flux",)
"""Whose schedule follows the size."""
CACHES = {
    "flux": ("cache.method=taylorseer", "cache.cache_interval=2", "cache.disable_cache_before_step=1"),
    "sd": ("cache.method=deepcache", "cache.cache_interval=2"),
}
CACHED = {name: (*keys, "verify.cached_psnr_db=1", "sampler.steps=[4]") for name, keys in CACHES.items()}
families = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in UNITS]


def ranged(name: str) -> tuple[str, ...]:
    unit = UNITS[name]
    side = f"{{min={2 * unit},max={4 * unit},step={unit}}}"
    return (f"shapes.height={side}", f"shapes.width={side}")


def pixels(name: str, size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0] * UNITS[name], "width": size[1] * UNITS[name]}


@pytest.mark.parametrize("name", families)
def test_sizes_of_a_range_are_diffusers_pictures(name):
    """None of them is what the graphs were traced at. Each picture has a negative prompt and a generator of its own."""
    negatives = {"negative_prompt": ["", "a blurred dog"]} if FAMILIES[name].negatives else {}
    for size in SIZES:
        call = {**pixels(name, size), **negatives}
        theirs = expected(name, list(PROMPTS[:2]), generator=[seeded(0), seeded(1)], **call)
        mine = got(name, list(PROMPTS[:2]), *ranged(name), generator=[seeded(0), seeded(1)], **call)
        assert relative_error(mine, theirs) < TOLERANCE
    artifact = ours(name, *ranged(name)).artifact
    assert {tuple(spec.axes) for g in artifact.manifest.graphs for spec in g.inputs} > {()}
    assert not list(range_problems(artifact.manifest))
    assert all(bool(plan.areas) == (name in SHIFTED) for plan in artifact.plans.values())


def test_the_decoded_picture_is_of_the_size():
    """3 x 4 units and 4 x 3 have as many tokens, and are no transpose of each other."""
    for size in (SIZES[0], SIZES[0][::-1]):
        call = {**pixels("flux", size), "generator": seeded(0), "output_type": "pt"}
        theirs = expected("flux", PROMPTS[0], **call)
        mine = ours("flux", *ranged("flux"))(PROMPTS[0], **{**call, "generator": seeded(0)})[0]
        assert relative_error(mine, theirs) < TOLERANCE


def test_positions_and_schedule_are_those_of_the_size(monkeypatch):
    """The canaries: a picture of 3 x 4 units with the token positions of 4 x 3, or with the schedule of the default size, is another."""
    pipe, size = ours("flux", *ranged("flux")), pixels("flux", SIZES[0])
    right = got("flux", PROMPTS[0], *ranged("flux"), generator=seeded(0), **size)
    with monkeypatch.context() as turned:
        positions = flux.token_positions
        turned.setattr(flux, "token_positions", lambda h, w: positions(w, h))
        assert relative_error(got("flux", PROMPTS[0], *ranged("flux"), generator=seeded(0), **size), right) > 1e-3
    (usual,) = pipe.artifact.plans
    with monkeypatch.context() as unshifted:
        unshifted.setattr(type(pipe.artifact), "plan_at", lambda self, name, height, width: usual)
        assert relative_error(got("flux", PROMPTS[0], *ranged("flux"), generator=seeded(0), **size), right) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_stores_values_of_each_size(name):
    """What it stores follows the size, and its plan is the one that the artifact of that size alone has."""
    size = pixels(name, SIZES[0])
    drawn = got(name, PROMPTS[0], *ranged(name), *CACHED[name], generator=seeded(0), **size)
    alone = (f"shapes.height={size['height']}", f"shapes.width={size['width']}")
    assert relative_error(drawn, got(name, PROMPTS[0], *alone, *CACHED[name], generator=seeded(0))) < TOLERANCE
    graphs = ours(name, *ranged(name), *CACHED[name]).artifact.manifest.graphs
    slots = [spec for g in graphs for spec in g.inputs if "@" in spec.name]
    assert any(spec.axes for spec in slots)  # those of text do not
    plain = got(name, PROMPTS[0], *ranged(name), *CACHED[name], generator=seeded(0), cache=False, **size)
    assert relative_error(plain, drawn) > 1e-4  # the canary: the cache does something


@pytest.mark.slow
def test_one_side_alone_may_be_a_range():
    side, height = ranged("flux")[1], 48
    pipe = ours("flux", f"shapes.height={height}", side)
    assert pipe.range.height.is_fixed
    for wide in (32, 64):
        size = {"height": height, "width": wide}
        theirs = expected("flux", PROMPTS[0], generator=seeded(0), **size)
        mine = got("flux", PROMPTS[0], f"shapes.height={height}", side, generator=seeded(0), **size)
        assert relative_error(mine, theirs) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd"])
def test_a_picture_to_begin_from_takes_the_size_of_the_call(name):
    size = pixels(name, SIZES[0])
    more = (*ranged(name), "sampler.image_to_image=true")
    alone = (f"shapes.height={size['height']}", f"shapes.width={size['width']}", "sampler.image_to_image=true")
    call = {"image": PICTURE, "strength": 0.5}
    drawn = got(name, PROMPTS[0], *more, generator=seeded(0), **call, **size)
    assert relative_error(drawn, got(name, PROMPTS[0], *alone, generator=seeded(0), **call)) < TOLERANCE


@pytest.mark.slow
def test_a_graph_for_two_pictures_takes_any_size(monkeypatch):
    monkeypatch.setattr(aoti, "has_batch_graphs", lambda config: True)
    graphs, size = (*ranged("flux"), "shapes.batch=[1,2]"), pixels("flux", SIZES[0])
    assert ours("flux", *graphs).artifact.manifest.graph("full.b2").inputs[0].axes
    theirs = expected("flux", list(PROMPTS), generator=[seeded(i) for i in range(3)], **size)
    mine = got("flux", list(PROMPTS), *graphs, generator=[seeded(i) for i in range(3)], **size)
    assert relative_error(mine, theirs) < TOLERANCE


@pytest.mark.slow
def test_modulation_leaves_the_loop_in_a_range_too():
    size = pixels("flux", SIZES[0])
    plain = got("flux", PROMPTS[0], *ranged("flux"), generator=seeded(0), **size)
    more = (*ranged("flux"), "compile.hoist=true")
    assert ours("flux", *more).artifact.manifest.graph("full").hoisted
    assert relative_error(got("flux", PROMPTS[0], *more, generator=seeded(0), **size), plain) < TOLERANCE


def test_sizes_outside_are_refused_with_the_nearest_two():
    pipe = ours("flux", *ranged("flux"))
    assert (pipe.range.height.min, pipe.range.height.max, pipe.range.height.step) == (32, 64, 16)
    assert pipe.sizes == ((32, 32),)
    assert "height 32 to 64 by 16" in repr(pipe)
    for height, width in ((40, 64), (64, 80), (16, 32), (33, 33)):
        nearest = " and ".join(f"height {h}, width {w}" for h, w in pipe.range.nearest(height, width))
        with pytest.raises(RequestError, match=f"the nearest are {nearest};"):
            pipe("x", height=height, width=width)


def test_a_graph_refuses_tensors_of_no_size_in_the_range():
    graph = ours("flux", *ranged("flux")).artifact.graph("full")
    inputs = {spec.name: torch.zeros(spec.shape) for spec in graph.graph.at(48, 64).inputs}
    assert graph(inputs)["sample"].shape == inputs["hidden_states"].shape
    more = {
        name: torch.cat([t, t, t, t, t, t, t], 1) if name in ("hidden_states", "img_ids") else t
        for name, t in inputs.items()
    }
    with pytest.raises(RequestError, match="'full': its inputs are of no size of the artifact"):
        graph(more)
    with pytest.raises(RequestError, match="'full': its inputs are of no size of the artifact"):
        graph({**inputs, "img_ids": inputs["img_ids"][:, 1:]})


def test_a_plan_has_the_schedule_of_every_area():
    """The scheduler's own, as FLUX's pipeline shifts it there."""
    artifact = ours("flux", *ranged("flux")).artifact
    (plan,) = artifact.plans.values()
    areas = {h * w for h in (32, 48, 64) for w in (32, 48, 64)}
    assert {schedule.area for schedule in plan.areas} == areas - {32 * 32}
    scheduler, shape = eager("flux").scheduler, artifact.manifest.range.latents_at(48, 64)
    table = tabulate_scheduler(scheduler, plan.steps, **exported_flux.scheduler_arguments(scheduler, shape, plan.steps))
    there = plan.at(48, 64)
    assert there.sigmas == table.sigmas
    assert tuple(e.timestep for e in there.evaluations) == table.timesteps
    assert tuple(e.update for e in there.evaluations) == table.updates
    assert there.evaluations != plan.evaluations


def test_schedules_that_a_reader_could_not_run_are_named():
    artifact = ours("flux", *ranged("flux")).artifact
    ((name, plan),) = artifact.plans.items()

    def problems(areas, manifest=artifact.manifest):
        return list(plan_problems({name: plan.model_copy(update={"areas": areas})}, manifest))

    assert not problems(plan.areas)
    assert "not so 4096" in problems(plan.areas[:-1])[0]
    wrong = plan.areas[0].evaluations[0].model_copy(update={"variant": "other"})
    spoiled = plan.areas[0].model_copy(update={"evaluations": (wrong, *plan.areas[0].evaluations[1:])})
    (problem,) = problems((spoiled, *plan.areas[1:]))
    assert f"[area {spoiled.area}] [evaluation 0]: variant 'other'" in problem
    assert "not so 1536" in problems(plan.areas, artifact.manifest.model_copy(update={"range": None}))[0]


def test_an_added_plan_is_for_every_area():
    artifact = ours("flux", *ranged("flux")).artifact
    recipe = resolve("flux-fast", (*PLAIN, *ranged("flux")), "tiny:flux")
    with open_progress("quiet") as quiet:
        (plan,), _ = build_plans(artifact.folder, artifact.manifest, recipe, 3, quiet)
    (other,) = artifact.plans.values()
    assert [schedule.area for schedule in plan.areas] == [schedule.area for schedule in other.areas]
    assert plan.at(48, 64).evaluations != plan.evaluations


REFUSED = {
    "flux-kontext": "positions of the image and of the picture",
    "pixart": "positions for the size that it is traced at",
    "cogvideox": "positions as tables of one size",
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_of_one_size_refuse_a_range_by_name(name):
    with pytest.raises(ExportError, match=f"{REFUSED[name]}.*shapes.sizes"):
        ours(name, "shapes.height={min=64,max=128,step=64}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("shapes.height={min=32,max=64,step=4}",), "multiples of 8 pixels.*set step=8"),
        (("shapes.height={min=16,max=64,step=16}",), "at least 32, two of the 16"),
    ],
)
def test_a_range_by_other_steps_is_refused(changes, said):
    with pytest.raises(ExportError, match=said):
        ours("sd", *changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("shapes.height={min=32,max=60,step=16}",), "nearest are 48 and 64"),
        (("shapes.height={min=32,max=64}",), "expected pixels, such as 1024, or"),
        (("shapes.height=wide",), "expected pixels, such as 1024, or"),
        (("shapes.height=0",), "expected greater than or equal to 1, got 0"),
        (
            ("shapes.height={min=32,max=64,step=16}", 'shapes.sizes=["32x32"]'),
            "sizes takes the place of height and width",
        ),
        (
            ("shapes.height={min=32,max=64,step=16}", "cache.method=fastercache", "verify.cached_psnr_db=1"),
            "tables of one size",
        ),
    ],
)
def test_ranges_that_say_nothing_are_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        resolve("sd-fast", (*FLOAT32, *changes), "tiny:sd")


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_backends_of_one_size_refuse_a_range_by_name(backend):
    pytest.importorskip(
        backend if backend == "onnxruntime" else "tensorrt_rtx",
        reason=f"{backend} is not installed: pip install 'prebake[ort,trt-rtx]'",
    )
    with pytest.raises(RecipeError, match=r"shapes.height, shapes.width.*shapes.sizes"):
        ours("flux", *ranged("flux"), f"compile.backend={backend}")
