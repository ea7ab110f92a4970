"""Tensors that tracing left as plain attributes become buffers; everything else stays what it was."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from prebake.exporter.passes.register_constants import register_constants


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.lifted = torch.arange(3.0)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.inner.lifted


def nodes(gm: fx.GraphModule) -> list[str]:
    return [f"{n.op} {n.target}" for n in gm.graph.nodes if n.op == "get_attr"]


def test_an_attribute_becomes_a_buffer_of_the_same_name():
    gm = fx.symbolic_trace(Shifted())
    del gm.inner._buffers["lifted"]
    gm.inner.lifted = torch.arange(3.0)  # as torch.export leaves some
    assert nodes(gm) == ["get_attr scale", "get_attr inner.lifted"]
    assert not dict(gm.named_buffers())
    after = register_constants(gm)
    assert nodes(after) == ["get_attr scale", "get_attr inner.lifted"]
    assert dict(after.named_buffers()).keys() == {"inner.lifted"}
    assert torch.equal(after(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0]))


def test_parameters_and_buffers_are_left_as_they_are():
    module = nn.BatchNorm1d(3).eval()
    gm = fx.symbolic_trace(nn.Sequential(module))
    parameters, buffers = dict(gm.named_parameters()), dict(gm.named_buffers())
    register_constants(gm)
    assert dict(gm.named_parameters()).keys() == parameters.keys()
    assert dict(gm.named_buffers()).keys() == buffers.keys()
