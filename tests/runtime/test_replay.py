"""The loop on graphs made of plain Python: no compiler, and every rule of plan.py by itself."""

import pytest
import torch

from prebake.runtime.manifest import Cost, Graph, Site
from prebake.runtime.plan import Evaluation, Plan, Update
from prebake.runtime.replay import (
    DenoiserVariant,
    StopReplay,
    Trajectory,
    forecast_latents,
    is_step_end,
    replay,
    tabulate_plan,
    tabulate_rows,
)

CPU = torch.device("cpu")
COST = Cost(flops=0, ops=0, constants=0, constants_bytes=0)
EULER = Update(latents=(1.0,), outputs=(-0.5,))


def variant(call, stores=(), combines=()):
    return DenoiserVariant(
        Graph(name="v", package="p", inputs=(), outputs=(), constants={}, cost=COST, stores=stores, combines=combines),
        call,
    )


def plan(*evaluations):
    return Plan(name="p", steps=1, scheduler="none", evaluations=evaluations)


def evaluation(name="full", step=0, update=EULER, **more):
    return Evaluation(step=step, variant=name, timestep=500.0, update=update, **more)


def run(evaluations, variants, sites=None, latents=None, **more):
    latents = torch.ones(1, 2, 3) if latents is None else latents
    return replay(tabulate_plan(plan(*evaluations), CPU, 0.001), variants, sites or {}, {}, latents, **more)


def test_an_evaluation_gets_the_scaled_latents_and_timestep():
    seen = {}

    def call(inputs):
        seen.update(inputs)
        return {"sample": torch.zeros(1, 2, 3)}

    run([evaluation(input_scale=0.25)], {"full": variant(call)})
    assert seen.keys() == {"hidden_states", "timestep"}
    assert torch.equal(seen["hidden_states"], torch.full((1, 2, 3), 0.25))
    assert torch.equal(seen["timestep"], torch.tensor([0.5]))


def test_an_update_reads_latents_and_outputs_newest_first():
    outputs = iter([10.0, 100.0])
    full = variant(lambda inputs: {"sample": torch.full((1, 2, 3), next(outputs))})
    second = Update(latents=(2.0, 3.0), outputs=(0.5, 0.25))
    got = run([evaluation(), evaluation(update=second)], {"full": full})
    x0, x1 = 1.0, 1.0 - 0.5 * 10.0
    assert torch.equal(got, torch.full((1, 2, 3), 2 * x1 + 3 * x0 + 0.5 * 100 + 0.25 * 10))


def test_noise_is_drawn_only_where_the_update_asks():
    full = variant(lambda inputs: {"sample": torch.zeros(1, 2, 3)})
    noisy = Update(latents=(1.0,), outputs=(0.0,), noise=0.5)
    got = run([evaluation(), evaluation(update=noisy)], {"full": full}, noise=[torch.full((1, 2, 3), 4.0)])
    assert torch.equal(got, torch.full((1, 2, 3), 3.0))


def test_the_first_store_fills_every_slot_and_later_ones_shift():
    fresh = iter([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])])
    seen = []

    def reuse(inputs):
        seen.append([inputs["a@0"].item(), inputs["a@1"].item(), inputs["b@0"].item(), inputs["coefficients"].tolist()])
        return {"sample": torch.zeros(1, 2, 3)}

    def full(inputs):
        value = next(fresh)
        return {"sample": torch.zeros(1, 2, 3), "a": value, "b": -value}

    sites = {"s": Site(name="s", slots=2, tensors=("a", "b"))}
    variants = {"full": variant(full, stores=("s",)), "reuse": variant(reuse, combines=("s",))}
    c = (1.5, -0.5)
    run(
        [evaluation(), evaluation("reuse", coefficients=c), evaluation(), evaluation("reuse", coefficients=(2.0, 0.0))],
        variants,
        sites,
    )
    assert seen == [[1.0, 1.0, -1.0, [[1.5, -0.5]]], [2.0, 1.0, -2.0, [[2.0, 0.0]]]]


def test_a_variant_that_stores_and_combines_reads_what_was_before_it():
    def both(inputs):
        return {"sample": torch.zeros(1, 2, 3), "a": inputs["a@0"] + 1}

    seen = []

    def on_evaluation(e, output, latents):
        seen.append(e)

    sites = {"s": Site(name="s", slots=1, tensors=("a",))}
    start = variant(lambda inputs: {"sample": torch.zeros(1, 2, 3), "a": torch.zeros(1)}, stores=("s",))
    last = []
    read = variant(
        lambda inputs: last.append(inputs["a@0"].item()) or {"sample": torch.zeros(1, 2, 3)}, combines=("s",)
    )
    variants = {"full": start, "both": variant(both, stores=("s",), combines=("s",)), "read": read}
    run(
        [evaluation(), evaluation("both"), evaluation("both"), evaluation("read")],
        variants,
        sites,
        on_evaluation=on_evaluation,
    )
    assert last == [2.0]
    assert seen == [0, 1, 2, 3]


def test_stored_values_do_not_outlive_a_replay():
    sites = {"s": Site(name="s", slots=1, tensors=("a",))}
    full = variant(lambda inputs: {"sample": torch.zeros(1, 2, 3), "a": torch.zeros(1)}, stores=("s",))
    reuse = variant(lambda inputs: {"sample": torch.zeros(1, 2, 3)}, combines=("s",))
    variants = {"full": full, "reuse": reuse}
    run([evaluation(), evaluation("reuse", coefficients=(1.0,))], variants, sites)
    with pytest.raises(KeyError):
        run([evaluation("reuse", coefficients=(1.0,))], variants, sites)


def test_on_evaluation_sees_outputs_replaces_latents_and_stops():
    full = variant(lambda inputs: {"sample": inputs["hidden_states"] * 2})
    seen = []

    def on_evaluation(e, output, latents):
        seen.append((e, output[0, 0, 0].item(), latents[0, 0, 0].item()))
        if e == 1:
            raise StopReplay(latents + 1)
        return latents + 10

    got = run([evaluation(step=i) for i in range(3)], {"full": full}, on_evaluation=on_evaluation)
    assert seen == [(0, 2.0, 0.0), (1, 20.0, 0.0)]
    assert torch.equal(got, torch.ones(1, 2, 3))


def test_the_loop_never_reads_a_tensor_back():
    """On the meta device there is no value to read, so a hidden sync would raise."""
    meta = torch.device("meta")
    full = variant(
        lambda inputs: {"sample": inputs["hidden_states"] * inputs["timestep"], "a": inputs["hidden_states"]},
        stores=("s",),
    )
    reuse = variant(lambda inputs: {"sample": inputs["a@0"] * inputs["coefficients"]}, combines=("s",))
    sites = {"s": Site(name="s", slots=1, tensors=("a",))}
    noisy = Update(latents=(0.5,), outputs=(0.5,), noise=1.0)
    tables = tabulate_plan(plan(evaluation(), evaluation("reuse", coefficients=(1.0,), update=noisy)), meta)
    x = torch.ones(1, 2, 3, device=meta)
    assert replay(tables, {"full": full, "reuse": reuse}, sites, {}, x, noise=[x]).shape == (1, 2, 3)


def test_coefficients_are_views_of_one_tensor():
    c = [(1.0, 2.0), (), (3.0,)]
    tables = tabulate_plan(plan(*(evaluation(coefficients=row) for row in c)), CPU)
    assert [row.tolist() for row in tables.coefficients] == [[list(row)] for row in c]
    assert len({row.untyped_storage().data_ptr() for row in tables.coefficients}) == 1


def test_a_step_ends_with_its_last_evaluation():
    heun = plan(evaluation(step=0), evaluation(step=0), evaluation(step=1))
    assert [is_step_end(heun, e) for e in range(3)] == [False, True, True]


def test_rows_of_numbers_begin_where_a_gpu_can_read_them():
    given = [(1.0,), (), tuple(map(float, range(70))), (2.0, 3.0)]
    made = tabulate_rows(given, CPU)
    assert [tuple(r.tolist()) for r in made] == given
    assert all(r.is_contiguous() and r.dtype == torch.float32 for r in made)
    begins = [r.data_ptr() - made[0].data_ptr() for r in made if len(r)]
    assert [b % 256 for b in begins] == [0] * 3
    assert len(set(begins)) == 3


def test_a_forecast_is_the_end_if_the_denoiser_says_the_same_again():
    update = Update(latents=(0.9, 0.1), outputs=(-0.1, 0.05))
    tables = tabulate_plan(plan(*[evaluation(step=i, update=update) for i in range(4)]), CPU)
    trajectory = Trajectory(tables, {}, torch.zeros(1, 2, 3))
    graph = variant(None).graph
    forecasts = []
    while trajectory.evaluation:
        trajectory.advance(graph, {}, {"sample": torch.ones(1, 2, 3)})
        forecasts.append(forecast_latents(trajectory))
    assert torch.equal(forecasts[-1], trajectory.latents)
    for forecast in forecasts:
        torch.testing.assert_close(forecast, trajectory.latents)
