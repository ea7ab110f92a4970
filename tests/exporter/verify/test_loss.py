"""The unit of the gate: what eager bfloat16 loses, from a reference that is made up."""

from types import SimpleNamespace

import pytest
import torch

from prebake.exporter.progress import Progress
from prebake.exporter.verify.loss import (
    BFLOAT16_SPACING,
    LEAST_LOSS,
    Bfloat16Loss,
    KnownEvaluation,
    KnownPicture,
    measure_loss,
    picture_loss,
)


class RoundedReference:
    """A denoiser that doubles, in the dtype that it was cast to."""

    def __init__(self, problem: str = "") -> None:
        self.dtype, self.problem = torch.float32, problem

    def cast_to_bfloat16(self):
        if self.problem:
            raise RuntimeError(self.problem)
        self.dtype = torch.bfloat16

    def evaluate(self, call):
        return (call.inputs["x"].to(self.dtype) * 2).float(), 1.0

    def draw(self, prompt, seed, steps):
        return SimpleNamespace(image=torch.full((1, 3, 8, 8), 0.5 + seed / 100))


def known(timestep: float, x: torch.Tensor) -> KnownEvaluation:
    return KnownEvaluation(None, timestep, SimpleNamespace(inputs={"x": x}), 2 * x)


def test_it_is_measured_at_the_same_inputs_and_on_the_same_pictures():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    pictures = [
        KnownPicture("a", 0, 8, torch.full((1, 3, 8, 8), 0.5)),
        KnownPicture("a", 1, 8, torch.full((1, 3, 8, 8), 0.5)),
    ]
    loss = measure_loss(
        RoundedReference(), [known(900.0, x), known(900.0, x), known(100.0, 3 * x)], pictures, Progress()
    )
    assert [t for t, _ in loss.evaluations[None]] == [900.0, 100.0]
    assert loss.at(None, 900.0) == pytest.approx(BFLOAT16_SPACING / 2 / 3**0.5, rel=0.5)  # rounding once
    assert loss.pictures_db == {8: [120.0, pytest.approx(40.0, abs=0.1)]}
    assert not loss.problem


def test_between_measured_timesteps_it_is_on_the_straight_line():
    loss = Bfloat16Loss({None: [(800.0, 0.004), (200.0, 0.01)]})
    assert loss.at(None, 500.0) == pytest.approx(0.007)
    assert (loss.at(None, 999.0), loss.at(None, 0.0)) == (0.004, 0.01)
    assert loss.at("64x32", 500.0) == loss.at(None, 500.0)  # a size at which nothing was measured
    assert Bfloat16Loss({None: [(1.0, 0.0)]}).at(None, 1.0) == LEAST_LOSS


def test_a_pipeline_that_does_not_run_in_bfloat16_is_held_to_the_spacing_of_its_numbers():
    loss = measure_loss(
        RoundedReference("no kernel for BFloat16\nand more"), [known(1.0, torch.ones(1))], [], Progress()
    )
    assert loss.problem == "eager bfloat16 does not run here: no kernel for BFloat16"
    assert loss.at(None, 500.0) == BFLOAT16_SPACING


def test_nothing_known_costs_nothing():
    reference = RoundedReference("would be cast")
    assert measure_loss(reference, [], [], Progress()) == Bfloat16Loss()


@pytest.mark.parametrize(("db", "loss"), [(20.0, 0.1), (40.0, 0.01), (120.0, 1e-6)])
def test_the_loss_of_a_picture_is_its_root_mean_square(db, loss):
    assert picture_loss(db) == pytest.approx(loss)
