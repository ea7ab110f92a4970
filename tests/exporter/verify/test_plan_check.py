"""The numbers of plans against those made anew, on plans that are made up."""

from math import inf

import pytest

from prebake.exporter.verify.plan_check import PLAN_TOLERANCE, plan_error
from prebake.runtime.plan import Evaluation, Plan, Tail, Update


def evaluation(**changes):
    given = {"step": 0, "variant": "full", "timestep": 999.0, "update": Update(latents=(1.0, 1e-12), outputs=(-0.02,))}
    return Evaluation(**{**given, "coefficients": (1.5, -0.5), "input_scale": 0.7, **changes})


def plan(*evaluations, **changes):
    return Plan(**{"name": "2", "steps": 1, "scheduler": "Euler", "evaluations": evaluations, **changes})


SAME = plan(evaluation(), evaluation())


@pytest.mark.parametrize(
    "changed",
    [
        evaluation(timestep=989.0),
        evaluation(input_scale=0.707),
        evaluation(coefficients=(1.515, -0.5)),
        evaluation(update=Update(latents=(1.0, 1e-12), outputs=(-0.0202,))),
        evaluation(update=Update(latents=(1.0, 0.01), outputs=(-0.02,))),
        evaluation(update=Update(latents=(1.0, 1e-12), outputs=(-0.02,), noise=0.01)),
        evaluation(update=Update(latents=(1.0, 1e-12), outputs=(-0.02,), unused_draws=1)),
    ],
)
def test_any_number_that_is_another_one_is_seen(changed):
    assert plan_error(plan(evaluation(), changed), SAME, with_cache=True) > PLAN_TOLERANCE


def test_rounding_is_no_error():
    close = evaluation(timestep=999.0 * (1 + 1e-7), update=Update(latents=(1.0, -3e-12), outputs=(-0.02,)))
    assert plan_error(plan(evaluation(), close), SAME, with_cache=True) < PLAN_TOLERANCE
    assert plan_error(SAME, SAME, with_cache=True) == 0


def test_what_has_no_place_is_infinitely_wrong():
    assert plan_error(plan(evaluation()), SAME, with_cache=True) == inf
    assert plan_error(plan(evaluation(), evaluation(coefficients=())), SAME, with_cache=True) == inf
    assert plan_error(plan(evaluation(), evaluation(coefficients=())), SAME, with_cache=False) == 0


def test_a_later_start_is_compared_as_well():
    tailed = plan(*SAME.evaluations, tails=(Tail(step=1, begin=1, head=(evaluation(),)),))
    other = plan(*SAME.evaluations, tails=(Tail(step=1, begin=1, head=(evaluation(timestep=989.0),)),))
    assert plan_error(other, tailed, with_cache=True) > PLAN_TOLERANCE
    assert plan_error(SAME, tailed, with_cache=True) == inf
