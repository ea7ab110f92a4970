"""One operator as a session of ONNX Runtime: it computes what the operator does, at sizes that it was not translated for too."""

from __future__ import annotations

import pytest
import torch

from prebake.exporter.cost.count import Operand
from prebake.exporter.cost.rate_grid import GridKind, grid_call
from prebake.exporter.lower import w8a8
from prebake.exporter.lower.onnx import single_call
from prebake.exporter.lower.onnx.single_call import SingleCalls

F32, aten = torch.float32, torch.ops.aten
KINDS = {
    "linear": (GridKind("matmul", aten.linear.default, (F32, F32)), ((3, 8, 16), (5, 32, 24))),
    "int8": (GridKind("matmul", w8a8.INT8_OPERATOR.default, (F32, torch.int8)), ((3, 8, 16), (5, 32, 24))),
    "convolution": (GridKind("convolution", aten.conv2d.default, (F32, F32), 3), ((16, 4, 8), (25, 8, 4))),
    "attention": (
        GridKind("attention", aten.scaled_dot_product_attention.default, (F32,)),
        ((8, 5, 16), (12, 9, 32)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_translation_serves_all_sizes(kind, monkeypatch):
    translated = []
    translate = single_call.onnx_model
    monkeypatch.setattr(single_call, "onnx_model", lambda *args: translated.append(args) or translate(*args))
    calls, seeded = SingleCalls(21, 1, prepack=False), torch.Generator().manual_seed(0)
    grid, sizes = KINDS[kind]
    for at in sizes:
        call = grid_call(grid, at)
        made = {
            o: torch.randint(-9, 9, o.shape, generator=seeded).to(o.dtype).as_strided(o.shape, o.stride)
            if o.dtype is torch.int8
            else torch.randn(o.shape, generator=seeded)
            for o in call.operands
        }
        arguments = tuple(made.get(a, a) if isinstance(a, Operand) else a for a in call.arguments)
        run = calls.stand_in(call.op, arguments, {})
        assert run is not None
        torch.testing.assert_close(run(), call.op(*arguments), rtol=1e-3, atol=1e-3)
    assert len(translated) == 1
