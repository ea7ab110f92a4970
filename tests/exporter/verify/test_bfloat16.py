"""Eager bfloat16 on a CPU without instructions for it: the same numbers, at float32's speed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prebake.exporter.verify import bfloat16
from prebake.exporter.verify.bfloat16 import eager_bfloat16, has_bfloat16_products
from prebake.exporter.verify.closeness import relative_error


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    monkeypatch.setattr(bfloat16, "cpu_flags", lambda: {"avx2"})


@pytest.mark.parametrize(
    ("flags", "fast"), [({"avx2"}, False), ({"avx512bw", "avx512vl", "avx512dq"}, True), (set(), False)]
)
def test_where_products_are_fast_they_are_left_to_torch(monkeypatch, flags, fast):
    monkeypatch.setattr(bfloat16, "cpu_flags", lambda: flags)
    assert has_bfloat16_products() is fast
    assert eager_bfloat16()._widens is not fast


def test_a_product_is_that_of_bfloat16_numbers_rounded_once():
    x, w, b = (torch.randn(*shape).bfloat16() for shape in ((5, 64), (32, 64), (32,)))
    image, kernel = torch.randn(1, 8, 9, 9).bfloat16(), torch.randn(4, 8, 3, 3).bfloat16()
    with eager_bfloat16():
        linear, conv, product = F.linear(x, w, b), F.conv2d(image, kernel), x @ w.T
    assert torch.equal(linear, F.linear(x.float(), w.float(), b.float()).bfloat16())
    assert torch.equal(conv, F.conv2d(image.float(), kernel.float()).bfloat16())
    assert torch.equal(product, (x.float() @ w.float().T).bfloat16())


def test_a_module_loses_about_as_much_as_in_torchs_own_bfloat16():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
    x = torch.randn(16, 64)
    with torch.no_grad():
        exact = layers(x)
        own = layers.bfloat16()(x.bfloat16())
        with eager_bfloat16():
            ours = layers(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) == pytest.approx(relative_error(own, exact), rel=0.3)


def test_what_is_not_all_bfloat16_is_left_as_it_is():
    x, w = torch.randn(2, 8), torch.randn(3, 8)
    with eager_bfloat16():
        assert torch.equal(F.linear(x, w), x @ w.T)
        with pytest.raises(RuntimeError):
            F.linear(x.bfloat16(), w)


def test_torch_draws_the_same_noise_in_bfloat16():
    """Else the same seed would give another picture, and the spread would be that of two pictures."""
    noise = [
        torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert torch.equal(noise[0].bfloat16(), noise[1])
