"""TensorRT's own pass: weights of convolutions lie channels last, those of Linears as they did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'prebake[export]'")
from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.lower.tensorrt import lay_channels_last
from prebake.exporter.passes.captured_graph import CapturedGraph, run_passes


def ops(graph: CapturedGraph) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in graph.gm.graph.nodes if n.op == "call_function"]


def test_weights_of_convolutions_are_laid_channels_last_and_others_not():
    x = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 5))
    graph = capture_graph("g", model, (x,), ("x",), ("y",))
    done = run_passes(graph, (lay_channels_last,))
    assert ops(done) == ops(graph) == ["conv2d.default", "linear.default"]
    before, after = graph.constants(), done.constants()
    assert (before["0.weight"].stride(), after["0.weight"].stride()) == ((27, 9, 3, 1), (27, 1, 9, 3))
    assert before["1.weight"].stride() == after["1.weight"].stride() == (6, 1)
    torch.testing.assert_close(done.gm(x)[0], graph.gm(x)[0])
