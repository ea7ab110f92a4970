"""Each CPU kernel alone gives what its operator means, and each operator what torch says in more words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, scaled_dot_product_attention

from prebake.exporter.lower import w8a8
from prebake.exporter.lower.aoti.kernels import operators
from prebake.exporter.lower.aoti.kernels.native import NativeKernels
from prebake.exporter.lower.aoti.kernels.operators import (
    GEGLU,
    GELU,
    NO_ACTIVATION,
    NO_NORM,
    attention,
    pack_columns,
    pack_gated,
    pack_taps,
    packed_w8a8,
    packed_w8a8_conv2d,
    rotary,
    unpack_columns,
    unpack_taps,
)
from support.kernel_cases import EPSILON, FLOAT, HALF, error, random, runs_here


@pytest.fixture(scope="session")
def native(tmp_path_factory) -> NativeKernels:
    """On one thread."""
    return NativeKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session", params=[2, 3], ids=["two threads", "three threads"])
def threaded(request, tmp_path_factory) -> NativeKernels:
    return NativeKernels(tmp_path_factory.mktemp("kernels"), request.param)


# --- int8 layers -----------------------------------------------------------------------------------------------------


@given(k=st.integers(1, 70), n=st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_a_packed_weight_comes_out_again(k, n):
    weight = torch.randint(-128, 128, (k, n), dtype=torch.int8)
    assert torch.equal(unpack_columns(pack_columns(weight), k, n), weight)


def layer(widths: tuple[int, ...], columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A packed weight, its scale and a bias."""
    weight, scale = w8a8.quantize_rows_int8(random(columns, sum(widths), seed=1))
    return pack_columns(weight.t().contiguous()), scale, random(columns, seed=2)


@runs_here
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "widths", "columns"),
    [
        pytest.param((1, 7), (64,), 96, id="fewer rows than a tile"),
        pytest.param((2, 171), (128,), 64, id="more rows than a block"),
        pytest.param((33,), (5,), 7, id="nothing fits"),
        pytest.param((25,), (48, 20, 1), 40, id="three inputs side by side"),
        pytest.param((1,), (256,), 1000, id="one row"),
    ],
)
@pytest.mark.parametrize("act", [NO_ACTIVATION, GELU], ids=["plain", "gelu"])
def test_int8_layers_are_the_operator(native, dtype, rows, widths, columns, act):
    xs = [random(*rows, width, dtype=dtype, seed=10 + i) for i, width in enumerate(widths)]
    packed, scale, bias = layer(widths, columns)
    for b in (bias, None):
        expected, made = packed_w8a8(xs, packed, scale, b, act), native.packed_w8a8(xs, packed, scale, b, act)
        assert made.shape == expected.shape
        assert made.dtype == expected.dtype
        # x * (127.5 / a) and x / a * 127.5 fall on two sides of a tie now and then: a level of 255 in one value of thousands
        assert error(made, expected) < 3e-3 + EPSILON[dtype]
    assert (
        error(native.packed_w8a8(xs, packed, scale * 1.01, None, act), expected) > 5e-3 + EPSILON[dtype]
    )  # the canary


@runs_here
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (37, 192)])
def test_gated_layers_are_the_operator(native, dtype, rows, columns):
    weight, scale = w8a8.quantize_rows_int8(random(columns, 48, seed=1))
    packed, scale, bias = pack_gated(weight.t().contiguous()), scale * 0.2, random(columns, seed=2)
    x = random(rows, 48, dtype=dtype)
    factors, gates = (w8a8.w8a8(x.float(), weight.t().contiguous(), scale, bias)).chunk(2, -1)
    exact, made = factors * nn.functional.gelu(gates), native.packed_w8a8([x], packed, scale, bias, GEGLU)
    assert made.dtype == dtype
    # ties of a token's levels, and what is rounded in bfloat16 in between
    assert error(made, exact) < 3e-3 + EPSILON[dtype]
    assert error(made, packed_w8a8([x], packed, scale, bias, GEGLU)) < 3e-3 + 2 * EPSILON[dtype]
    other = factors * nn.functional.gelu(gates, approximate="tanh")
    assert error(made, other) > 3 * error(made, exact) or dtype == HALF, "it is the other GELU"
    assert error(native.packed_w8a8([x], packed, scale, bias.flip(0), GEGLU), exact) > 0.01 + EPSILON[dtype]


@runs_here
def test_mixed_dtypes_become_the_wider(native):
    xs = [random(9, 32, dtype=HALF), random(9, 16, seed=1)]
    packed, scale, bias = layer((32, 16), 24)
    made = native.packed_w8a8(xs, packed, scale, bias, NO_ACTIVATION)
    assert made.dtype == FLOAT
    assert error(made, packed_w8a8(xs, packed, scale, bias, NO_ACTIVATION)) < 3e-3


@runs_here
def test_extreme_rows_stay_finite(native):
    xs = [torch.stack([torch.zeros(64), torch.full((64,), 3e38), torch.full((64,), 1e-30)])]
    packed, scale, _ = layer((64,), 32)
    made = native.packed_w8a8(xs, packed, scale * 1e-3, None, NO_ACTIVATION)
    assert torch.equal(made[0], torch.zeros(32))
    assert made.isfinite().all()


@runs_here
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 3, 5), (13, 1027, 70), (6, 4096, 32)])
def test_the_largest_sums_of_bytes_are_exact(native, rows, inner, columns):
    """Products of +-127 and -128 whose sums no 16 bits hold: numbers up to 127, one of them 127, are their own bytes."""
    signs = torch.randint(0, 2, (rows, inner), generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = (signs * 127).float()
    weight = torch.full((inner, columns), -128, dtype=torch.int8)
    weight[:, 1::2] = random(inner, columns // 2).mul(60).clamp(-128, 127).to(torch.int8)
    x[0] = 127
    made = native.packed_w8a8([x], pack_columns(weight), torch.ones(columns), None, NO_ACTIVATION)
    sums = x.long() @ weight.long()
    assert torch.equal(made, sums.float() * (torch.tensor(127.0) / 127.5))


@runs_here
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("at", [0, 5, 39, 68])
def test_what_is_no_number_stays_none_in_its_row(native, dtype, at):
    xs = [random(3, width, dtype=dtype) for width in (40, 29)]
    packed, scale, bias = layer((40, 29), 36)
    expected = native.packed_w8a8(xs, packed, scale, bias, GELU)
    xs[at // 40][1, at % 40] = float("nan")
    made = native.packed_w8a8(xs, packed, scale, bias, GELU)
    assert made[1].isnan().all()
    assert torch.equal(made[::2], expected[::2])


@runs_here
def test_calls_leave_no_memory_behind(native):
    packed, scale, _ = layer((64,), 32)
    x = random(500_000, 64, dtype=HALF)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(3):  # what malloc keeps for itself comes with the first
        native.packed_w8a8([x], packed, scale, None, NO_ACTIVATION)
    before = resident()
    for _ in range(5):
        native.packed_w8a8([x], packed, scale, None, NO_ACTIVATION)
    assert resident() - before < 64e6, "more than two of the five outputs, which are of 32 MB"


# --- int8 convolutions -----------------------------------------------------------------------------------------------

CONVOLUTIONS = pytest.mark.parametrize(
    ("shape", "columns", "kernel", "stride", "padding"),
    [
        pytest.param((1, 64, 16, 24), 32, 3, 1, 1, id="whole tiles"),
        pytest.param((2, 30, 13, 9), 70, 3, 2, 1, id="every other pixel of an odd picture"),
        pytest.param((1, 5, 4, 5), 3, 1, 1, 0, id="one pixel"),
        pytest.param((1, 17, 33, 50), 40, 5, 2, 2, id="five by five"),
        pytest.param((1, 8, 3, 300), 8, 3, 1, 0, id="one row, wider than a block"),
    ],
)


def convolution(shape: tuple[int, ...], columns: int, kernel: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, ...]:
    """A picture with dark and bright pixels, channels last, a weight by rows of the kernel, its scale and a bias."""
    x = random(*shape) * torch.logspace(-2, 2, shape[2] * shape[3]).reshape(shape[2:])
    weight, scale = w8a8.quantize_rows_int8(random(columns, kernel * kernel * shape[1], seed=1))
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight.t().contiguous(), scale, random(columns, seed=2)


@CONVOLUTIONS
def test_an_int8_convolution_is_that_of_what_is_rounded(shape, columns, kernel, stride, padding):
    x, weight, scale, bias = convolution(shape, columns, kernel)
    a = x.double().abs().amax(1, keepdim=True)
    rounded = (x.double() / a * 127.49999).round() * a / 127.5  # the largest is a tie, which becomes 127
    filters = (weight.double() * scale).t().reshape(columns, kernel, kernel, -1).permute(0, 3, 1, 2)
    expected = conv2d(rounded, filters, bias.double(), stride, padding)
    made = w8a8.w8a8_conv2d(x, weight, scale, bias, kernel, stride, padding)
    assert made.is_contiguous(memory_format=torch.channels_last)
    # sums of float32, of pixels that differ by four orders of magnitude; and one tie of thousands that float32 sees elsewhere
    assert error(made, expected) < 1e-4
    assert error(made, conv2d(x.double(), filters, bias.double(), stride, padding)) > 1e-3  # the canary


@runs_here
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@CONVOLUTIONS
def test_the_convolutions_kernel_is_the_operator(native, dtype, shape, columns, kernel, stride, padding):
    x, weight, scale, bias = convolution(shape, columns, kernel, dtype)
    packed = pack_taps(weight, kernel * kernel)
    assert torch.equal(unpack_taps(packed, kernel * kernel, shape[1], columns), weight)
    for b in (bias, None):
        rest = (scale, b, kernel, stride, padding, *NO_NORM)
        expected, made = packed_w8a8_conv2d(x, packed, *rest), native.packed_w8a8_conv2d(x, packed, *rest)
        assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), expected.dtype)
        # a tie now and then, as with a layer
        assert error(made, expected) < 3e-3 + EPSILON[dtype]
    brighter = native.packed_w8a8_conv2d(x, packed, scale * 1.02, None, kernel, stride, padding, *NO_NORM)
    assert error(brighter, expected) > 5e-3 + EPSILON[dtype]  # the canary


@runs_here
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 24, 9, 14), 4), ((1, 96, 16, 16), 32), ((1, 70, 5, 3), 1), ((1, 6, 40, 50), 6)]
)
@pytest.mark.parametrize("far", [False, True], ids=["about zero", "far from zero"])
def test_a_convolution_norms_its_picture(native, dtype, shape, groups, far):
    _, weight, scale, bias = convolution(shape, 40, 3)
    mean = {HALF: 2, FLOAT: 50}[dtype] if far else 0  # at 50 bfloat16 has but a few numbers
    x = (random(*shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    norm_weight, norm_bias = random(shape[1], seed=4), random(shape[1], seed=5)
    packed = pack_taps(weight, 9)

    def drawn(by, epsilon=1e-5):
        return by.packed_w8a8_conv2d(x, packed, scale, bias, 3, 1, 1, groups, epsilon, norm_weight, norm_bias)

    normed = nn.functional.group_norm(x.double(), groups, norm_weight.double(), norm_bias.double(), 1e-5)
    expected = w8a8.w8a8_conv2d(nn.functional.silu(normed).float(), weight, scale, bias, 3, 1, 1)
    # values between two levels go either way where SiLU differs in its last digits: a level of 255 in some of thousands
    assert error(drawn(native), expected) < 3e-3 + EPSILON[dtype]
    assert error(drawn(operators), expected) < 3e-3 + EPSILON[dtype]
    assert error(drawn(native, epsilon=0.3), expected) > 1e-2 + EPSILON[dtype]  # the canary


# --- few rows --------------------------------------------------------------------------------------------------------


@runs_here
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [((1,), 64, 96), ((3, 1), 1000, 33), ((4,), 7, 5), ((2,), 80, 31)]
)
def test_few_rows_are_a_linear(native, dtype, rows, inner, columns):
    x, weight = random(*rows, inner, dtype=dtype), random(columns, inner, dtype=dtype, seed=1)
    for bias in (random(columns, dtype=dtype, seed=2), None):
        exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        made = native.few_rows(x, weight, bias)
        assert (made.shape, made.dtype) == (exact.shape, dtype)
        assert error(made, exact) < EPSILON[dtype]  # float32 sums, and what is rounded once at the end
    assert error(native.few_rows(x, weight * 1.01, None), exact) > EPSILON[dtype]  # the canary


# --- attention -------------------------------------------------------------------------------------------------------


@runs_here
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "features"),
    [
        pytest.param(3, 64, 64, 64, id="whole panels"),
        pytest.param(2, 13, 33, 16, id="no whole tile"),
        pytest.param(1, 1, 1, 2, id="one key"),
        pytest.param(2, 50, 1301, 40, id="three blocks of keys"),
        pytest.param(9, 30, 77, 160, id="more heads than threads"),
        pytest.param(1, 300, 40, 512, id="one wide head"),
    ],
)
def test_attention_is_as_exact_as_bfloat16_allows(native, heads, queries, keys, features):
    q = random(2, heads, queries, features, dtype=HALF)
    k, v = (random(2, heads, keys, features, dtype=HALF, seed=s) for s in (1, 2))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    made = native.attention(q, k, v, features**-0.5)
    # torch's own rounds the same things: weights, and what comes out
    assert error(made, exact) < 1.2 * error(scaled_dot_product_attention(q, k, v), exact) + 1e-4
    assert made.stride() == attention(q, k, v, 1.0).stride()
    assert error(native.attention(q, k, v, features**-0.5 * 1.5), exact) > 0.01 or keys == 1  # the canary


@runs_here
def test_attention_takes_any_strides_and_large_scores(native):
    whole = random(1, 50, 3, 4, 32, dtype=HALF) * 30
    q, k, v = (x.transpose(1, 2) for x in whole.unbind(2))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert not q.is_contiguous()
    assert error(native.attention(q, k, v, 32**-0.5), exact) < 2**-8


# --- rotary embeddings -----------------------------------------------------------------------------------------------


@runs_here
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("table", [(1, 7, 1, 40), (1, 1, 5, 40), (2, 7, 5, 40)], ids=["rows", "columns", "all"])
def test_pairs_are_turned_as_the_operator_says(native, dtype, table):
    x, cosines, sines = random(2, 7, 5, 40, dtype=dtype), random(*table, seed=1), random(*table, seed=2)
    for to_half in (False, True):
        made, expected = native.rotary(x, cosines, sines, to_half), rotary(x, cosines, sines, to_half)
        assert made.dtype == expected.dtype
        # one fused multiplication and addition in place of two operations: an ulp, or one of bfloat16 where that is a tie
        assert error(made, expected) < (1e-3 if to_half else 1e-6)
        assert error(native.rotary(x, sines, cosines, to_half), expected) > 0.1  # the canary


# --- threads and rows ------------------------------------------------------------------------------------------------


def called_layer(by: NativeKernels, rows: slice, dtype: torch.dtype, act: int) -> Tensor:
    """A layer of two inputs, the second of which is narrower than a vector: its last codes lie just before the next row's."""
    weight, scale = w8a8.quantize_rows_int8(random(192, 64, seed=1))
    pack = pack_gated if act == GEGLU else pack_columns
    xs = [random(230, width, dtype=dtype, seed=width)[rows].contiguous() for width in (60, 4)]
    return by.packed_w8a8(xs, pack(weight.t().contiguous()), scale, random(192, seed=2), act)


def called_convolution(by: NativeKernels, rows: slice, dtype: torch.dtype, groups: int) -> Tensor:
    weight, scale = w8a8.quantize_rows_int8(random(40, 9 * 24, seed=1))
    x = random(13, 24, 9, 14, dtype=dtype)[rows].contiguous(memory_format=torch.channels_last)
    norm = (groups, 1e-5, random(24, seed=4), random(24, seed=5)) if groups else NO_NORM
    return by.packed_w8a8_conv2d(x, pack_taps(weight.t().contiguous(), 9), scale, None, 3, 1, 1, *norm)


def called_few_rows(by: NativeKernels, rows: slice, dtype: torch.dtype, _: int) -> Tensor:
    weight, bias = random(33, 1003, dtype=dtype, seed=1), random(33, dtype=dtype, seed=2)
    return by.few_rows(random(13, 1003, dtype=dtype)[rows].contiguous(), weight, bias)


def called_attention(by: NativeKernels, rows: slice, dtype: torch.dtype, keys: int) -> Tensor:
    q, k, v = (random(2, n, 2, 40, dtype=dtype, seed=n).transpose(1, 2) for n in (67, keys, keys + 1))
    return by.attention(q[:, :, rows], k, v[:, :, :keys], 40**-0.5).transpose(0, 2).contiguous()


def called_rotary(by: NativeKernels, rows: slice, dtype: torch.dtype, to_half: int) -> Tensor:
    x, table = random(13, 7, 5, 40, dtype=dtype)[rows].contiguous(), random(1, 7, 1, 40, seed=1)
    return by.rotary(x, table, table.flip(1), bool(to_half))


CALLS = [
    pytest.param(call, dtype, how, id=f"{call.__name__.removeprefix('called_')}-{str(dtype)[6:]}-{how}")
    for call, dtypes, ways in (
        (called_layer, (FLOAT, HALF), (NO_ACTIVATION, GELU, GEGLU)),
        (called_convolution, (FLOAT, HALF), (0, 4)),
        (called_few_rows, (FLOAT, HALF), (0,)),
        (called_attention, (HALF,), (21, 700)),
        (called_rotary, (FLOAT, HALF), (0, 1)),
    )
    for dtype in dtypes
    for how in ways
]


@runs_here
@pytest.mark.parametrize(("call", "dtype", "how"), CALLS)
def test_threads_change_no_bit(native, threaded, call, dtype, how):
    once = call(native, slice(None), dtype, how)
    for _ in range(5):  # threads take rows in another order each time
        assert torch.equal(call(threaded, slice(None), dtype, how), once)


@runs_here
@pytest.mark.parametrize(("call", "dtype", "how"), CALLS)
def test_a_row_alone_is_to_the_bit_what_it_is_among_others(native, call, dtype, how):
    alone = [call(native, slice(i, i + 1), dtype, how) for i in range(13)]
    for rows in (2, 3, 7, 13):
        assert torch.equal(call(native, slice(rows), dtype, how), torch.cat(alone[:rows])), rows
