"""The engine on the compiled toy: every picture is to the bit what it is alone, whatever else is drawn beside it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from prebake.runtime import ArtifactError, RequestError
from prebake.runtime.engine.engine import Engine
from prebake.runtime.engine.jobs import OPENING
from prebake.runtime.engine.memory import picture_bytes
from prebake.runtime.replay import DenoiserVariant, Trajectory

PROMPTS = ("red circle", "blue", "a red circle", "")


def random_call(rng: random.Random) -> dict[str, Any]:
    return {
        "prompt": rng.choice(PROMPTS),
        "cache": rng.random() < 0.5,
        "guidance_scale": rng.choice((1.0, 2.0, 3.5)),
        "num_images_per_prompt": rng.choice((1, 1, 2)),
        "seed": rng.randrange(1000),
        "output_type": rng.choice(("latent", "pt")),
    }


class Shared:
    """Plays a graph for several pictures with that for one: to the bit the same, by one call of the engine, which takes as long as
    one of a larger model."""

    def __init__(self, call: Any, batch: int):
        self.call, self.batch = call, batch

    def __call__(self, inputs: Any) -> Any:
        time.sleep(0.001)
        rows = [{name: t[i : i + 1].contiguous() for name, t in inputs.items()} for i in range(self.batch)]
        made = [self.call(row) for row in rows]
        return {name: torch.cat([one[name] for one in made]) for name in made[0]}


def share_evaluations(engine: Engine, *batches: int) -> None:
    """Gives the engine graphs for as many pictures."""
    one = engine._graphs.variants[1]
    for batch in (1, *batches):
        engine._graphs.variants[batch] = {
            name: DenoiserVariant(v.graph, Shared(v.call, batch)) for name, v in one.items()
        }


@pytest.fixture
def calls():
    rng = random.Random(5)
    return [random_call(rng) for _ in range(60)]


@pytest.mark.parametrize("batches", [(), (2, 4)])
def test_every_picture_is_what_it_is_alone(pipe, calls, batches):
    sizes: Counter[int] = Counter()
    variants = pipe.artifact.variants

    def on_entry(graph: str, batch: int, predicted: float, seconds: float) -> None:
        if graph in variants:
            sizes[batch] += 1

    rng = random.Random(6)
    with Engine(pipe, on_entry=on_entry) as engine:
        if batches:
            share_evaluations(engine, *batches)
        pending = []
        for call in calls:
            pending.append(engine.submit(**call))
            if rng.random() < 0.1:
                time.sleep(rng.random() * 0.003)
        drawn = [each.result(60) for each in pending]
    for call, got in zip(calls, drawn, strict=True):
        assert torch.equal(got, pipe(**call).images), call
    mean = sum(batch * count for batch, count in sizes.items()) / sizes.total()
    assert mean > 1.5 if batches else mean == 1
    assert engine.held_bytes == 0


def test_a_perturbed_neighbour_changes_nothing_but_itself(pipe):
    """The canary of the test above: a row that got its neighbour's values would be seen."""
    with Engine(pipe) as engine:
        share_evaluations(engine, 2)
        one, other = (engine.submit("red", seed=seed, output_type="latent") for seed in (1, 2))
        assert not torch.equal(one.result(30), other.result(30))


def test_partial_pictures_come_in_order_and_before_the_last(pipe):
    seen: list[tuple[int, int]] = []
    with Engine(pipe) as engine:
        pending = engine.submit(
            "red", seed=1, partial_images=2, on_partial=lambda i, k, image: seen.append((i, k, image.size))
        )
        images = pending.result(30)
    assert seen == [(0, 0, (8, 8)), (0, 1, (8, 8))]
    assert images == pipe("red", seed=1).images


def test_no_more_partial_pictures_than_a_plan_has_room_for(pipe):
    seen = []
    with Engine(pipe) as engine:
        engine.submit("red", seed=1, partial_images=50, on_partial=lambda *each: seen.append(each)).result(30)
    assert len(seen) == len(pipe.artifact.plans["4"].evaluations) - 1


def test_a_cancelled_request_is_gone_after_the_entry_that_runs(pipe):
    ran: list[str] = []
    submitted = threading.Event()
    with Engine(pipe, on_entry=lambda graph, *_: ran.append(graph)) as engine:

        def cancel(*_: Any) -> None:
            submitted.wait(30)
            before.append(len(ran))
            assert pending.cancel()

        before: list[int] = []
        pending = engine.submit("red", seed=1, partial_images=1, on_partial=cancel)
        submitted.set()
        with pytest.raises(CancelledError):
            pending.result(30)
    assert len(ran) == before[0] + 1  # the entry that was running
    assert engine.held_bytes == 0


def test_a_request_that_does_not_fit_waits(pipe):
    with Engine(pipe) as engine:
        nbytes = picture_bytes(pipe.artifact.manifest, engine._reader.read_all({"prompt": "red"}))
    most = []
    with Engine(pipe, memory_bytes=2 * nbytes, on_entry=lambda *_: most.append(engine.held_bytes)) as engine:
        pending = [engine.submit("red", seed=i, output_type="latent") for i in range(8)]
        large = engine.submit("red", seed=0, num_images_per_prompt=3, output_type="latent")
        for i, each in enumerate(pending):
            assert torch.equal(each.result(30), pipe("red", seed=i, output_type="latent").images)
        assert len(large.result(30)) == 3  # more than the bound, so it was alone
    assert set(most) <= {nbytes, 2 * nbytes, 3 * nbytes}
    assert 2 * nbytes in most


def tensors_of(trajectory: Trajectory) -> list[torch.Tensor]:
    stored = [t for kept in trajectory.stored.values() for generation in kept for t in generation.values()]
    return [trajectory.latents, *trajectory.starts, *trajectory.outputs, *trajectory.inputs.values(), *stored]


def test_the_predicted_bytes_are_no_less_than_what_a_picture_holds(pipe):
    held = []
    with Engine(pipe) as engine:
        request = engine._reader.read_all({"prompt": "red"})

        def look(graph: str, *_: Any) -> None:
            for job in engine._jobs:
                for picture in job.pictures or ():
                    storages = {
                        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                        for t in tensors_of(picture.trajectory)
                    }
                    held.append(sum(storages.values()))

        engine._on_entry = look
        engine.submit("red", seed=1).result(30)
    assert 0 < max(held) <= picture_bytes(pipe.artifact.manifest, request)


def test_what_is_asked_wrongly_is_refused_at_once(pipe):
    with Engine(pipe) as engine:
        with pytest.raises(RequestError, match=r"^num_inference_steps=5"):
            engine.submit("red", num_inference_steps=5)
        with pytest.raises(RequestError, match=r"^callback_on_step_end"):
            engine.submit("red", callback_on_step_end=print)
        with pytest.raises(RequestError, match=r"^seed"):
            engine.submit("red", seed=2**70).result(30)  # what is seen at its opening


def test_a_failed_request_is_told_and_others_go_on(pipe, monkeypatch):
    bound = pipe.artifact.graph("vae_decoder")
    model, broken = bound._model, [True]

    def once(inputs: Any) -> Any:
        made = model(inputs)
        return [made[0] * float("nan"), *made[1:]] if broken and broken.pop() else made

    monkeypatch.setattr(bound, "_model", once)
    with Engine(pipe) as engine:
        results = [engine.submit("red", seed=i) for i in range(3)]
        failed = [each.exception(30) for each in results]
    assert sum(isinstance(e, ArtifactError) for e in failed) == 1
    assert sum(e is None for e in failed) == 2
    assert engine.held_bytes == 0


def test_a_picture_that_fails_in_a_shared_evaluation_fails_alone(pipe):
    with Engine(pipe) as engine:
        share_evaluations(engine, 2)
        shared = engine._graphs.variants[2]["full"]
        broken = [True]

        def one_row(inputs: Any) -> Any:
            made = shared.call(inputs)
            if broken and broken.pop():
                made["sample"][0] = float("nan")
            return made

        engine._graphs.variants[2] = {**engine._graphs.variants[2], "full": DenoiserVariant(shared.graph, one_row)}
        pending = [engine.submit("red", seed=i, output_type="latent") for i in range(6)]
        failed = [each.exception(30) for each in pending]
    assert not broken
    assert sum(isinstance(e, ArtifactError) for e in failed) == 1
    for i, each in enumerate(pending):
        if not failed[i]:
            assert torch.equal(each.result(), pipe("red", seed=i, output_type="latent").images)


def test_close_draws_what_was_submitted_and_takes_no_more(pipe):
    engine = Engine(pipe)
    pending = [engine.submit("red", seed=i) for i in range(4)]
    engine.close()
    assert all(each.done() and not each.exception() for each in pending)
    with pytest.raises(RequestError, match="its engine was closed"):
        engine.submit("red")


def test_calls_of_the_pipeline_get_their_turn(pipe):
    """The engine holds runners while it has work: a call that waits for one is let in between two entries."""
    with Engine(pipe) as engine:
        pending = [engine.submit("red", seed=i, num_images_per_prompt=4) for i in range(20)]
        pipe("red", seed=1)
        assert not all(each.done() for each in pending)


def test_a_request_is_predicted_by_the_calls_that_were_made(pipe):
    seen: dict[str, list[float]] = {}
    with Engine(pipe, on_entry=lambda graph, b, p, seconds: seen.setdefault(graph, []).append(seconds)) as engine:
        engine.submit("red", seed=1).result(30)
        means = {graph: engine.costs.seconds(graph) for graph in seen}
        second = engine.submit("red", seed=1)
        second.result(30)
    for graph, seconds in seen.items():
        first = seconds[: len(seconds) // 2]
        assert min(first) <= means[graph] <= max(first)
    assert seen.keys() > {OPENING, "vae_decoder"}
    assert second.predicted_s == pytest.approx(sum(means[graph] * (len(calls) // 2) for graph, calls in seen.items()))
    assert second.queued_s == 0
