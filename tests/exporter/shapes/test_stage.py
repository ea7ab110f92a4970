"""A stage that was stopped and started again ends where an uninterrupted one does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from prebake.exporter.shapes import stage


def trained(path: Path, steps: int, stops: tuple[int | None, ...], ema: float | None = None) -> torch.Tensor:
    """The weights after 20 steps, run as one process per stop."""
    for stop in stops:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)

        def step(i: int, rng: np.random.Generator, model=model) -> torch.Tensor:
            x = torch.from_numpy(rng.standard_normal((8, 4), np.float32))
            return (model(x) - torch.randn(8, 3) - x[:, :3]).square().mean()

        optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
        stage.run_stage(path, model, step, steps=steps, optimisers=[optimiser], ema=ema, save_every=5, stop_at=stop)
    return model.weight.detach()


@pytest.mark.parametrize("ema", [None, 0.9])
def test_resumed_run_equals_uninterrupted_run(tmp_path, ema):
    whole = trained(tmp_path / "a.pt", 20, (None,), ema)
    (tmp_path / "b").mkdir()
    parts = trained(tmp_path / "b" / "a.pt", 20, (7, 13, None), ema)  # steps 6 and 7, 11 to 13 are done twice
    assert torch.equal(whole, parts)


def test_finished_stage_is_only_loaded(tmp_path):
    first = trained(tmp_path / "a.pt", 20, (None,))
    written = (tmp_path / "a.pt").stat().st_mtime_ns
    assert torch.equal(first, trained(tmp_path / "a.pt", 20, (None,)))
    assert (tmp_path / "a.pt").stat().st_mtime_ns == written


def test_another_stage_name_draws_other_batches(tmp_path):
    """Canary: equality above is not for lack of randomness."""
    assert not torch.equal(trained(tmp_path / "a.pt", 20, (None,)), trained(tmp_path / "b.pt", 20, (None,)))
