"""A weight is derived once for all graphs that share it, and again for others."""

from __future__ import annotations

import torch
from torch import fx, nn

from prebake.exporter.passes.derived_weights import DerivedWeights


def turned(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().t().contiguous()


def test_graphs_of_one_model_share_what_is_made_of_its_weights():
    layer, weights = nn.Linear(4, 3), DerivedWeights()
    one, two = (fx.symbolic_trace(nn.Sequential(layer)) for _ in "ab")
    assert weights.store(one, "0.weight", "t", turned) == weights.store(two, "0.weight", "t", turned) == "0.weight_t"
    assert one.get_buffer("0.weight_t") is two.get_buffer("0.weight_t")
    assert torch.equal(one.get_buffer("0.weight_t"), layer.weight.t())


def test_other_weights_and_other_forms_are_made_anew():
    weights = DerivedWeights()
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)))
    names = [
        weights.store(gm, name, how, turned) for name, how in (("0.weight", "t"), ("1.weight", "t"), ("0.weight", "u"))
    ]
    assert names == ["0.weight_t", "1.weight_t", "0.weight_u"]
    assert len({gm.get_buffer(name).data_ptr() for name in names}) == 3
