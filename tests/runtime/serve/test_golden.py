"""A server is ready once its artifact draws what it drew where it was exported."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from prebake.exporter.package.folder import file_entries
from prebake.runtime import ArtifactError, load
from prebake.runtime.engine.costs import CostTable
from prebake.runtime.serve.golden import replay_golden
from support import toy_model as toy


def write_golden(folder, pipe, factor: float) -> None:
    """Golden vectors of the default plan, the denoiser's outputs times `factor`."""
    outputs = []
    name = "4"
    graphs = {g: pipe.artifact.graphs[g] for g in pipe.artifact.variants}
    taps = {g: bound._model for g, bound in graphs.items()}
    for g, bound in graphs.items():

        def tapped(inputs, g=g):
            made = taps[g](inputs)
            outputs.append(made[0].clone())
            return made

        bound._model = tapped
    try:
        pipe("red", seed=0)
    finally:
        for g, bound in graphs.items():
            bound._model = taps[g]
    tensors = {
        "prompt": torch.tensor(list(b"red"), dtype=torch.uint8),
        "seed": torch.tensor([0]),
        "evaluations": torch.tensor([0, 2, 3]),
        "outputs": torch.cat([outputs[e] * factor for e in (0, 2, 3)]),
    }
    (folder / "golden").mkdir()
    save_file(tensors, folder / "golden" / f"{name}.safetensors")
    toy.edit_manifest(folder, files=[entry.model_dump() for entry in file_entries(folder)])


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_golden_vectors_are_compared(artifact_copy, cache_dir, pipe, factor):
    write_golden(artifact_copy, pipe, factor)
    costs = CostTable({})
    with load(artifact_copy, cache_dir=cache_dir) as served:
        if factor == 1.0:
            assert replay_golden(served, costs) == ["4"]
            assert costs.seconds("full") > 0
        else:
            with pytest.raises(ArtifactError, match=r"evaluation 0 of plan '4' is off by 0\.1"):
                replay_golden(served, costs)


def test_an_artifact_without_golden_vectors_is_not_compared(pipe):
    assert replay_golden(pipe, CostTable({})) == []
