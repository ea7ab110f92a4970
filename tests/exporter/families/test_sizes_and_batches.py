"""Sizes and batches of every family, beside diffusers: one artifact with two sizes, whose calls take one and two pictures together."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch

from prebake.exporter.lower import aoti
from prebake.exporter.package.folder import plan_path
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.replan.rebuild import build_plans
from prebake.runtime import RequestError
from prebake.runtime.check.artifact import plan_problems
from support.family_parity import (
    FAMILIES,
    PICTURE,
    PLAIN,
    PROMPTS,
    TOLERANCE,
    expected,
    got,
    ours,
    relative_error,
    seeded,
)

HEIGHT, WIDTH = 32, 64
FURTHER = {"cogvideox": (32, 48)}
"""Height and width of the second size; each family's first is its tiny model's own, square."""
QUICK = ("flux", "sd")
CACHES = {
    "flux": ("cache.method=taylorseer", "cache.cache_interval=2", "cache.disable_cache_before_step=1"),
    "sd": ("cache.method=deepcache", "cache.cache_interval=2"),
}
"""Of four steps, some of them predicted."""
CACHED = {name: (*keys, "verify.cached_psnr_db=1", "sampler.steps=[4]") for name, keys in CACHES.items()}
TWO = "shapes.batch=2"
"""The same batches in other words: what is captured with graphs for two is not what is captured without."""


def further(name: str) -> dict[str, int]:
    height, width = FURTHER.get(name, (HEIGHT, WIDTH))
    return {"height": height, "width": width}


@functools.cache
def overrides(name: str) -> tuple[str, ...]:
    (height, width), size = ours(name).sizes[0], further(name)
    return (f'shapes.sizes=["{width}x{height}","{size["width"]}x{size["height"]}"]', "shapes.batch=[1,2]")


def call_of(name: str, seeds=(0, 1, 2)) -> dict:
    negatives = {"negative_prompt": ["", "a blurred dog", "snow and ice"]} if FAMILIES[name].negatives else {}
    return {"generator": [seeded(seed) for seed in seeds], **negatives}


@pytest.fixture
def batch_graphs(monkeypatch):
    """Graphs for two pictures, as a GPU has them."""
    monkeypatch.setattr(aoti, "has_batch_graphs", lambda config: True)


families = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in FAMILIES
    if "image" not in FAMILIES[name].call
]


cached = [pytest.param(name, marks=() if name == "flux" else pytest.mark.slow) for name in CACHES]


@pytest.mark.parametrize("name", families)
def test_three_prompts_at_a_further_size_are_diffusers_pictures(name, batch_graphs):
    """A group of two and one alone, each with a prompt, a negative prompt and a generator of its own."""
    graphs = (*overrides(name), TWO)
    theirs = expected(name, list(PROMPTS), **further(name), **call_of(name))
    mine = got(name, list(PROMPTS), *graphs, **further(name), **call_of(name))
    assert {g.name for g in ours(name, *graphs).artifact.manifest.graphs} > {"full.b2"}
    assert relative_error(mine, theirs) < TOLERANCE
    other = got(name, [PROMPTS[1], PROMPTS[0], PROMPTS[2]], *graphs, **further(name), **call_of(name))
    assert relative_error(other, theirs) > 100 * TOLERANCE  # the canary: rows exchanged


@pytest.mark.parametrize("name", cached)
def test_a_picture_alone_and_in_a_batch_is_equal_to_the_bit(name):
    """In any place of any batch, with a cache, at both sizes."""
    pipe = ours(name, *overrides(name), *CACHED[name])
    assert pipe.batches == (1, 2)
    negatives = call_of(name).get("negative_prompt")

    def draw(rows, **size):
        more = {"negative_prompt": [negatives[i] for i in rows]} if negatives else {}
        generators = [seeded(i) for i in rows]
        return pipe([PROMPTS[i] for i in rows], generator=generators, output_type="latent", **more, **size)[0]

    for size in ({}, further(name)):
        alone = [draw([i], **size) for i in range(3)]
        for order in ((0, 1), (1, 0), (2, 1, 0)):
            assert torch.equal(draw(order, **size), torch.cat([alone[i] for i in order]))


@pytest.mark.parametrize("name", cached)
def test_a_graph_for_two_pictures_gives_each_its_own_coefficients(name, batch_graphs):
    """A cached plan by graphs for two, against the same plan one by one."""
    graphs = (*overrides(name), *CACHED[name], TWO)
    call = {"generator": [seeded(0), seeded(1)], **further(name)}
    together = got(name, list(PROMPTS[:2]), *graphs, **call)
    apart = [got(name, PROMPTS[i], *graphs, **{**call, "generator": seeded(i)}) for i in range(2)]
    assert relative_error(together, torch.cat(apart)) < TOLERANCE
    artifact = ours(name, *graphs).artifact
    plan = next(plan for plan in artifact.plans.values() if plan.cache != "none")
    e = next(e for e, evaluation in enumerate(plan.evaluations) if evaluation.coefficients)
    tables = artifact.tables_from(plan.name, 0, 2)
    assert torch.equal(tables.coefficients[e], torch.tensor([plan.evaluations[e].coefficients] * 2))
    with mock.patch.dict(artifact._tables, {(plan.name, 0, 2): spoil_second_row(tables, e)}):
        size = {} if plan.size is None else further(name)
        spoiled = got(name, list(PROMPTS[:2]), *graphs, generator=[seeded(0), seeded(1)], **size)
    mine = got(name, list(PROMPTS[:2]), *graphs, generator=[seeded(0), seeded(1)], **size)
    assert torch.equal(spoiled[0], mine[0])
    assert relative_error(spoiled[1], mine[1]) > 1e-3  # the canary: a row's coefficient is its own


def spoil_second_row(tables, e):
    """The tables with other coefficients of the second picture at evaluation e."""
    rows = [row.clone() for row in tables.coefficients]
    rows[e][1] *= 0.5
    return type(tables)(tables.plan, tables.timesteps, tuple(rows))


def test_sizes_that_are_not_there_are_refused_with_the_nearest_two():
    pipe = ours("flux", *overrides("flux"))
    assert pipe.sizes[1] == (HEIGHT, WIDTH)
    with pytest.raises(RequestError, match=rf"height=40, width=72: .*height {HEIGHT}, width {WIDTH} and height"):
        pipe("x", height=40, width=72)
    with pytest.raises(RequestError, match="width=80"):
        pipe("x", width=80)


def test_a_shift_by_size_is_in_the_plan_of_each_size():
    """FLUX's schedule follows the number of tokens."""
    plans = ours("flux", *overrides("flux")).artifact.plans
    default, size = (plans[name] for name in plans if not name.endswith("uncached"))
    assert (default.size, size.size) == (None, f"{WIDTH}x{HEIGHT}")
    assert default.evaluations[1].timestep != size.evaluations[1].timestep
    assert {e.variant for e in size.evaluations} == {f"full.{WIDTH}x{HEIGHT}"}


def test_an_added_plan_is_for_every_size():
    artifact = ours("flux", *overrides("flux")).artifact
    recipe = resolve("flux-fast", (*PLAIN, *overrides("flux")), "tiny:flux")
    with open_progress("quiet") as quiet:
        plans, _ = build_plans(artifact.folder, artifact.manifest, recipe, 3, quiet)
    assert [plan.name for plan in plans] == ["3", f"3@{WIDTH}x{HEIGHT}"]
    assert plans[0].evaluations[1].timestep != plans[1].evaluations[1].timestep
    assert not list(plan_problems({plan.name: plan for plan in plans}, listing(artifact.manifest, plans)))


def listing(manifest, plans):
    return manifest.model_copy(update={"plans": {plan.name: plan_path(plan) for plan in plans}})


def test_a_plan_for_a_size_that_is_not_there_is_named():
    artifact = ours("flux", *overrides("flux")).artifact
    (plan,) = (plan for plan in artifact.plans.values() if plan.size)
    fewer = artifact.manifest.model_copy(update={"sizes": ()})
    (problem,) = plan_problems({plan.name: plan}, fewer)
    assert f"is for the size {WIDTH}x{HEIGHT}, which is not in sizes" in problem


@pytest.mark.parametrize("name", ["flux-kontext", "sdxl-refiner"])
@pytest.mark.slow
def test_a_picture_to_look_at_takes_the_size_of_the_call(name):
    call = {"image": PICTURE, **further(name)}
    drawn = got(name, PROMPTS[0], *overrides(name), generator=seeded(0), **call)
    assert drawn.shape[1:] == ours(name, *overrides(name)).families[1].latents_shape
