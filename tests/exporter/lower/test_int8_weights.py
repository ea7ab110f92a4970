"""Layers whose weights alone are in 8 bits, as each backend has them: the same numbers, and weights that stay in int8."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.cost.count import count_cost
from prebake.exporter.lower.int8_weights import replace_layers

ROUNDING = 0.01
"""Relative in L2. A row of 48 to 144 normal numbers has a largest of about 2.5 deviations: a step of 2.5 / 127.5 of one, whose
rounding loses 0.6% of a weight, and as much of a sum of products with them."""


class Layers(nn.Module):
    """A convolution in two groups, and a Linear over its channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(32, 48, 3, stride=2, padding=1, groups=2), nn.Linear(48, 24)
        for weight in (self.conv.weight, self.linear.weight):
            nn.init.normal_(weight)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.linear(self.conv(x).permute(0, 2, 3, 1)),)


X = torch.randn(1, 32, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cases():
    """(the graph with int8 weights, what float32 gives)."""
    layers = Layers().eval()
    with torch.no_grad():
        (expected,) = layers(X)
    replace_layers(layers, {"conv", "linear"})
    return capture_graph("layers", layers, (X,), ("x",), ("y",)), expected


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_they_give_what_float32_gives_up_to_rounding_and_cost_as_much(cases):
    graph, expected = cases
    with torch.no_grad():
        assert 1e-3 < relative_error(graph.gm(X)[0], expected) < ROUNDING
    plain = count_cost(capture_graph("layers", Layers().eval(), (X,), ("x",), ("y",)))
    assert count_cost(graph).flops == plain.flops > 0
    assert count_cost(graph).constants_bytes < plain.constants_bytes / 3


def test_a_row_of_zeros_and_one_of_the_largest_numbers_stay_finite():
    linear = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0] * 4, [3e38] * 4]))
    model = nn.Sequential(linear)
    replace_layers(model, {"0"})
    assert model(torch.eye(4)).isfinite().all()
    assert model(torch.eye(4))[:, 0].eq(0).all()


def test_bfloat16_goes_through_in_its_own_dtype():
    layers = Layers().eval()
    with torch.no_grad():
        (expected,) = layers(X)
        layers.bfloat16()
        replace_layers(layers, {"conv", "linear"})
        (got,) = layers(X.bfloat16())
    assert got.dtype == torch.bfloat16
    assert relative_error(got.float(), expected) < ROUNDING + 2**-7  # a rounding of bfloat16 in each of two layers


def test_an_onnx_session_multiplies_the_same_and_holds_the_weights_in_int8(cases, tmp_path):
    onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'prebake[export]'")
    onnxruntime: Any = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is not installed: pip install 'prebake[ort]'"
    )
    from prebake.exporter.lower.onnx.graph import embed_data, onnx_model
    from prebake.exporter.lower.onnx.rewrite import rewrite_graph

    graph = rewrite_graph(cases[0])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that an optimized model is this machine's
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(
        embed_data(onnx_model(graph), graph.constants()).SerializeToString(), options
    )
    (got,) = session.run(None, {"x": X.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(got), graph.gm(X)[0]) < 1e-5  # float32 sums in another order
    held = onnx.load(tmp_path / "optimized.onnx").graph
    assert sorted(i.data_type for i in held.initializer if len(i.dims) > 1) == [onnx.TensorProto.INT8] * 2
    kinds = Counter(node.op_type for node in held.node)
    assert (kinds["DequantizeLinear"], kinds["MatMulNBits"]) == (2, 0)


@pytest.mark.slow  # calls the C++ compiler
def test_compiled_code_multiplies_the_same_and_asks_for_int8_weights(cases, tmp_path):
    from torch._inductor.package import load_package

    from prebake.exporter.lower.aoti import compile_flags, compile_graph, write_package
    from prebake.exporter.recipe.resolve import resolve

    graph, _ = cases
    files = compile_graph(graph, compile_flags(resolve("baseline", (), "tiny:flux").compile), tmp_path / "build")
    write_package(tmp_path / "layers.pt2", {"layers": files})
    model = load_package(str(tmp_path / "layers.pt2"), "layers")
    asked = dict(graph.constants())
    assert set(model.get_constant_fqns()) == set(asked)
    model.load_constants({n: t.detach() for n, t in asked.items()}, check_full_update=True, user_managed=True)
    (got,) = model(X)
    with torch.no_grad():
        assert relative_error(got, graph.gm(X)[0]) < 1e-5
