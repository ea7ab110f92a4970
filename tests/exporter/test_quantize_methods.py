"""Each quantization method answers what the backends ask of it, and the recipe knows exactly these methods."""

from __future__ import annotations

import pytest
import torch

from prebake.exporter.quantize import METHODS, Fp8Dynamic, Int8Dynamic, NoQuantize
from prebake.exporter.recipe.schema import table_types

ANSWERS = {
    "none": ("kept", True, False, (0, 0)),
    "int8_dynamic": ("int8", True, True, (0, 0)),
    "fp8_dynamic": ("fp8", False, False, (8, 9)),
}


def test_the_recipe_takes_the_registered_methods():
    assert table_types("quantize") == METHODS == dict(zip(ANSWERS, (NoQuantize, Int8Dynamic, Fp8Dynamic), strict=True))


@pytest.mark.parametrize("name", ANSWERS)
def test_a_method_says_what_its_products_need(name):
    method = METHODS[name]()
    assert (method.treatment, method.on_cpu, method.has_int8_products, method.gpu_capability) == ANSWERS[name]


def test_convolutions_are_quantized_only_where_they_are_asked_for():
    assert not any(METHODS[name]().quantizes_convolutions for name in METHODS)
    assert Int8Dynamic(convolutions=True).quantizes_convolutions


@pytest.mark.parametrize(("method", "dtype"), [(Int8Dynamic(), torch.int8), (Fp8Dynamic(), torch.float8_e4m3fn)])
def test_rows_are_quantized_and_multiplied_by_the_method_itself(method, dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(8, 16), torch.randn(20, 16)
    rows, scale = method.quantize_rows(weight)
    assert (rows.dtype, rows.shape, scale.shape) == (dtype, (8, 16), (8,))
    y = method.linear_operator()(x, rows.t().contiguous(), scale, None)
    error = (y - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert 0 < error < 0.05  # 8 bits, of which fp8 has 4 for the mantissa
