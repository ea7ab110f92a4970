"""What a verification draws within a budget, from costs that are made up: no model."""

from __future__ import annotations

import math
import random

import pytest

from prebake.exporter.recipe.duration import parse_duration
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.verify.budget import (
    Costs,
    choose_workload,
    count_opening_steps,
    format_seconds,
    spread,
)
from prebake.exporter.verify.closeness import covered_share, mean_interval
from prebake.runtime.errors import RecipeError
from prebake.runtime.plan import Evaluation, Plan, Update

JOBS = tuple((prompt, seed) for seed in range(4) for prompt in ("a", "b", "c", "d"))
SD15 = Costs({"full": 4.4, "reuse": 0.4}, 14.0, once=6.0, eager_once=20.0)  # seconds, as on two cores
SMALL = Costs({"full": 0.01, "reuse": 0.002}, 0.03, once=0.02, eager_once=0.05)


def plan(name: str, variants: str, evaluations_a_step: int = 1) -> Plan:
    """A plan by its strip: f is the variant that computes everything, r one that does not."""
    update = Update(latents=(1.0,), outputs=(1.0,))
    evaluations = tuple(
        Evaluation(
            step=e // evaluations_a_step, variant="full" if v == "f" else "reuse", timestep=float(-e), update=update
        )
        for e, v in enumerate(variants)
    )
    steps = evaluations[-1].step + 1
    return Plan(name=name, steps=steps, scheduler="EulerDiscreteScheduler", evaluations=evaluations)


PLANS = {"50": plan("50", "frr" * 16 + "fr"), "50-uncached": plan("50-uncached", "f" * 50)}


def choose(budget: float | None, costs: Costs = SD15, jobs=JOBS, checked: int = 0):
    return choose_workload(budget, costs, PLANS, {"full"}, jobs, checked)


def test_with_time_for_all_everything_is_drawn():
    for work in (choose(None), choose(120.0, SMALL), choose(600.0, SMALL, checked=64)):
        assert work.is_whole
        assert work.jobs == JOBS
        assert work.count == work.asked
        assert work.count.evaluations == 4 * 100  # seed 0 of four prompts, two plans of 50
    assert choose(None).seconds > 6 * 3600  # what it was meant to cure


def test_a_picture_of_eagers_that_does_not_fit_leaves_evaluations():
    """Ten minutes at the size of Stable Diffusion 1.5, where one picture in eager takes twelve."""
    work = choose(600.0)
    assert (work.jobs, work.traced) == ((), ("a", 0))
    assert work.seconds <= 600
    assert work.count.evaluations >= 10
    for name, forced in work.forced.items():
        assert forced[0] == 0
        assert all(PLANS[name].evaluations[e].step < work.steps[name] for e in forced)
    gated = [e for e in work.forced["50"] if PLANS["50"].evaluations[e].variant == "full"]
    assert len(gated) >= len(work.forced["50"]) / 2


def test_pictures_that_fit_are_drawn_of_different_prompts_first():
    work = choose(3600.0)
    assert not work.is_whole
    assert work.traced is None
    assert work.jobs == JOBS[: len(work.jobs)] != ()
    assert work.seconds <= 3600
    assert work.count.evaluations >= 16


def test_checked_prompts_share_the_time():
    work = choose(4 * 3600.0, checked=64)
    assert work.checked >= 1
    assert len(work.jobs) >= 1
    assert work.seconds <= 4 * 3600
    assert "of 64 checked prompts" in work.describe()
    alone = choose(3600.0, jobs=(), checked=64)
    assert 1 <= alone.checked < 64
    assert alone.count.evaluations == 0


@pytest.mark.parametrize("seed", range(200))
def test_any_budget_is_kept_or_is_too_little_for_anything(seed):
    """Whatever things cost: no more than the budget is spent, unless the least that says something costs more."""
    rng = random.Random(seed)
    costs = Costs({v: 10 ** rng.uniform(-3, 2) for v in ("full", "reuse")}, 10 ** rng.uniform(-3, 2), rng.random(), 1.0)
    budget, checked = 10 ** rng.uniform(0, 5), rng.choice([0, 64])
    work = choose(budget, costs, checked=checked)
    least = sum(costs.draw(p, count_opening_steps(p)) for p in PLANS.values()) + 4 * costs.evaluation
    assert work.seconds <= max(budget, least * (1 + 1e-9))
    assert all(0 <= a <= b for a, b in zip(*(vars(c).values() for c in (work.count, work.asked)), strict=True))
    assert work.count.evaluations > 0
    more = choose(2 * budget, costs, checked=checked)
    assert len(more.jobs) >= len(work.jobs)


@pytest.mark.parametrize(
    ("strip", "a_step", "steps"),
    [("f" * 8, 1, 8), ("f" * 50, 1, 4), ("ffffffffr" + "f" * 20, 1, 9), ("f" * 20, 2, 2), ("frr" * 10, 1, 4)],
)
def test_the_opening_of_a_plan_runs_each_variant(strip, a_step, steps):
    assert count_opening_steps(plan("p", strip, a_step)) == steps


def test_evaluations_are_evenly_spread():
    assert spread(range(10), 4) == (0, 3, 6, 9)
    assert spread(range(10), 1) == (9,)
    assert spread(range(3), 5) == (0, 1, 2)
    assert spread((), 2) == spread(range(3), 0) == ()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("full", None)])
def test_a_time_as_a_recipe_writes_it(text, seconds):
    assert parse_duration(text) == seconds
    assert resolve("baseline", (f"verify.budget={text}",)).verify.budget == text


@pytest.mark.parametrize("text", ["", "10", "0m", "1.5h", "-1s", "10 m", "10d"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="90s, 10m or 2h, or full"):
        parse_duration(text)
    with pytest.raises(RecipeError, match=r"verify\.budget"):
        resolve("baseline", (f"verify.budget={text}",))


def test_the_interval_of_a_mean_is_students():
    """By hand: three values with standard deviation 2, t = 4.303, so 4.303 * 2 / sqrt(3) = 4.97 either way."""
    assert mean_interval([48.0, 50.0, 52.0]) == (50.0, 45.0, 55.0)
    assert mean_interval([40.0]) is None
    assert mean_interval([40.0, math.nan]) is None
    assert covered_share(59) == pytest.approx(0.95, abs=2e-3)  # the rule of 59


def test_seconds_in_words():
    assert [format_seconds(s) for s in (0.2, 89, 600, 7200)] == ["1 s", "89 s", "10 min", "2.0 h"]
