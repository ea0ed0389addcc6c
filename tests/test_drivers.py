"""Drivers (matrix product, convolution, table) against NumPy, on every ISA and with several threads."""

import numpy as np
import pytest
from kernel_arrays import INF, clamp

from afpq import _core
from afpq.formats import AfpFormat, codebook, decode, encode, fake_quantize, round_scale
from afpq.packing import pack

FORMATS = ["e0m1", "e2m1", "e2m2", "e0m5", "e2m4", "e0m7", "e3m1", "e3m3", "e2m5", "e4m1", "e5m2"]


def quantized(rng, n, k, fmt, groups=1):
    weight = rng.standard_normal((n, k)).astype(np.float32)
    scale = round_scale(fmt, np.full((groups, n), 2.5 / fmt.max_integer), "real")
    scale *= np.exp2(rng.integers(-2, 3, (groups, n))).astype(np.float32)
    spread = np.repeat(scale.T, -(-k // groups), axis=1)[:, :k]
    codes = encode(weight, fmt, spread)
    return pack(codes, fmt.bits), scale, codes, decode(codes, fmt, spread).astype(np.float64)


def rounded_rows(x, planes):
    """Rows as a8 or a16 sees them, from the recipe in csrc/drivers/gemm.h: float64 values."""
    if planes == 0:
        return x.astype(np.float64)
    levels = np.float32(255 if planes == 1 else 65535)
    low = np.minimum(x.min(1, keepdims=True), 0)
    high = np.maximum(x.max(1, keepdims=True), 0)
    scale = high / levels - low / levels
    inverse = np.float32(1) / scale
    zero = np.rint(-low * inverse)
    q = np.clip(np.rint(x * inverse) + zero, 0, levels)
    return (q.astype(np.float64) - zero) * scale


def run_matmul(
    isa,
    x,
    data,
    fmt,
    n,
    k,
    scale,
    *,
    activations,
    threads=1,
    bias=None,
    group_size=0,
    low=-INF,
    high=INF,
):
    return _core.matmul(
        isa, threads, x, data, str(fmt), n, k, scale, group_size, bias, activations, low, high
    )


PLANES = {"f32": 0, "a8": 1, "a16": 2}


@pytest.mark.parametrize("activations", ["f32", "a8", "a16"])
@pytest.mark.parametrize("text", FORMATS)
def test_matmul_equals_the_product_of_rounded_rows_and_decoded_weights(isa, text, activations):
    rng = np.random.default_rng(1)
    fmt, m, n, k = AfpFormat.parse(text), 53, 75, 130
    data, scale, _, weight = quantized(rng, n, k, fmt)
    x = rng.standard_normal((m, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    y = run_matmul(isa, x, data, fmt, n, k, scale, activations=activations, bias=bias)
    rows = rounded_rows(x, 0 if fmt.kernel_class == "wide" else PLANES[activations])
    exact = rows @ weight.T + bias
    bound = (k + 4) * 2.0**-24 * (np.abs(rows) @ np.abs(weight).T + np.abs(bias))
    assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("m", [1, 2, 7, 48, 49, 100])
@pytest.mark.parametrize("activations", ["f32", "a8", "a16"])
def test_every_isa_and_thread_count_gives_the_same_bits(activations, m):
    rng = np.random.default_rng(2)
    for text in ("e2m2", "e3m1", "e4m1", "e0m7"):
        fmt, n, k = AfpFormat.parse(text), 200, 515
        data, scale, _, _ = quantized(rng, n, k, fmt)
        x = rng.standard_normal((m, k)).astype(np.float32)
        expected = run_matmul("scalar", x, data, fmt, n, k, scale, activations=activations)
        for isa in _core.kernels.isa_names():
            for threads in (1, 3):
                y = run_matmul(
                    isa, x, data, fmt, n, k, scale, activations=activations, threads=threads
                )
                np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("activations", ["a8", "a16"])
@pytest.mark.parametrize("text", ["e2m3", "e2m4", "e0m7", "e3m1", "e2m5", "e3m3"])
def test_sums_that_do_not_fit_words_have_the_same_bits_too(text, activations):
    # Weights of one sign add up to a little less, and to a little more, than rows of words allow.
    fmt, n, m = AfpFormat.parse(text), 20, 7
    rng = np.random.default_rng(13)
    largest = min(fmt.max_integer, 127 if fmt.kernel_class == "pair" else fmt.max_integer)
    for k in (32767 // largest, 32767 // largest + 4):
        code = int(
            np.flatnonzero(codebook(fmt) == codebook(fmt)[codebook(fmt) <= largest].max())[0]
        )
        codes = np.full((n, k), code, np.uint8)
        codes[1] |= 1 << (fmt.bits - 1)  # the other sign
        scale = np.ones(n, np.float32)
        x = rng.standard_normal((m, k)).astype(np.float32)
        x[0], x[1], x[2, 0] = np.abs(x[0]), -np.abs(x[1]), 1e4
        first = None
        for isa in _core.kernels.isa_names():
            y = run_matmul(isa, x, pack(codes, fmt.bits), fmt, n, k, scale, activations=activations)
            first = y if first is None else first
            np.testing.assert_array_equal(y, first)
        rows, weight = rounded_rows(x, PLANES[activations]), codebook(fmt)[codes]
        bound = (k + 4) * 2.0**-24 * (np.abs(rows) @ np.abs(weight).T)
        assert (np.abs(first - rows @ weight.T) <= bound).all()


def whole_rows(rng, m, k):
    """Numbers that a16 keeps as they are, with the scale 1."""
    x = rng.integers(0, 65536, (m, k)).astype(np.float32)
    x[:, 0], x[0] = 65535, 65535
    return x


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 60])
@pytest.mark.parametrize("last", [7, 8])
def test_a16_rounds_sums_of_pairs_once_where_they_fit_int32(m, last):
    """Up to 32767 of one sign in every channel: the greatest sum is 65535 * 32767."""
    fmt, n, k = AfpFormat(2, 5), 70, 132
    rng = np.random.default_rng(14)
    integers = rng.choice(codebook(fmt)[:128], (n, k)) * rng.choice([-1, 1], (n, k))
    integers[3] = [252] * 130 + [last, -1]
    fits = max(integers.clip(0).sum(1).max(), -integers.clip(None, 0).sum(1).min()) <= 32767
    assert fits == (last == 7)
    data = pack(encode(integers, fmt, np.float32(1)), fmt.bits)
    x = whole_rows(rng, m, k)
    found = [
        run_matmul(isa, x, data, fmt, n, k, np.ones(n, np.float32), activations="a16")
        for isa in _core.kernels.isa_names()
    ]
    exact = x.astype(np.int64) @ integers.astype(np.int64).T
    for y in found:
        np.testing.assert_array_equal(y, found[0])
        assert (np.abs(y - exact) <= np.abs(exact) * 2.0**-22 + 2.0**8).all()
    assert (found[0] == exact.astype(np.float32)).all() == fits


@pytest.mark.parametrize("group_size", [0, 32])
def test_every_group_of_pairs_has_its_own_sum(isa, group_size):
    """What one sum cannot hold, those of groups may: then each is rounded once, and added to what was there."""
    fmt, n, k = AfpFormat(3, 3), 20, 96
    rng = np.random.default_rng(15)
    integers = codebook(fmt)[rng.integers(0, 64, (n, k))]
    x = whole_rows(rng, 5, k)
    scale = np.ones((3, n) if group_size else n, np.float32)
    data = pack(encode(integers, fmt, np.float32(1)), fmt.bits)
    y = run_matmul(isa, x, data, fmt, n, k, scale, activations="a16", group_size=group_size)
    terms = x.astype(np.int64)[:, None] * integers.astype(np.int64)
    if group_size:
        expected = np.zeros((5, n), np.float32)
        for part in np.split(terms, 3, axis=2):
            expected = part.sum(2).astype(np.float32) + expected
        np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(y, terms.sum(2), rtol=1e-6)


@pytest.mark.parametrize("activations", ["f32", "a8", "a16"])
def test_matmul_applies_one_scale_a_group_of_k(isa, activations):
    rng = np.random.default_rng(3)
    fmt, m, n, k, size = AfpFormat(2, 1), 5, 33, 100, 32
    _, scale, _, _ = quantized(rng, n, k, fmt, groups=4)
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    codes[codes == 8] = 0
    weight = codebook(fmt)[codes] * np.repeat(scale.T, size, axis=1)[:, :k].astype(np.float64)
    x = rng.standard_normal((m, k)).astype(np.float32)
    y = run_matmul(
        isa, x, pack(codes, 4), fmt, n, k, scale, activations=activations, group_size=size
    )
    rows = rounded_rows(x, PLANES[activations])
    bound = (k + 8) * 2.0**-24 * (np.abs(rows) @ np.abs(weight).T)
    assert (np.abs(y - rows @ weight.T) <= bound).all()


def test_sums_over_a_very_long_k_do_not_overflow(isa):
    fmt, k = AfpFormat(0, 7), 140_000
    codes = np.full((1, k), 127, np.uint8)
    x = np.ones((1, k), np.float32)
    y = run_matmul(isa, x, pack(codes, 8), fmt, 1, k, np.ones(1, np.float32), activations="a8")
    assert y[0, 0] == pytest.approx(127 * k, rel=1e-6)


def test_a_row_with_nan_or_infinity_gives_nan_and_spares_the_others(isa):
    rng = np.random.default_rng(4)
    fmt = AfpFormat(2, 2)
    data, scale, _, _ = quantized(rng, 20, 32, fmt)
    x = rng.standard_normal((3, 32)).astype(np.float32)
    clean = run_matmul(isa, x, data, fmt, 20, 32, scale, activations="a16", low=0.0)
    x[0, 5], x[2, 31] = np.nan, np.inf
    y = run_matmul(isa, x, data, fmt, 20, 32, scale, activations="a16", low=0.0)
    assert np.isnan(y[0]).all() and np.isnan(y[2]).all()
    np.testing.assert_array_equal(y[1], clean[1])


def test_rows_of_zeros_give_the_bias(isa):
    fmt = AfpFormat(2, 2)
    data, scale, _, _ = quantized(np.random.default_rng(5), 20, 32, fmt)
    bias = np.arange(20, dtype=np.float32)
    y = run_matmul(
        isa, np.zeros((2, 32), np.float32), data, fmt, 20, 32, scale, activations="a8", bias=bias
    )
    np.testing.assert_array_equal(y, np.tile(bias, (2, 1)))


STATIC = [
    ("e0m7", 0.0234375),
    ("e2m4", 0.025),
    ("ue1m7", 0.015625),
    ("ue2m5", 0.0125),
    ("ue2m3", 0.1),
]


@pytest.mark.parametrize(("activation_format", "scale"), STATIC)
@pytest.mark.parametrize("text", ["e0m5", "e2m2", "e2m4", "e3m2", "e4m1"])
def test_matmul_rounds_activations_to_a_static_format(text, activation_format, scale):
    rng = np.random.default_rng(9)
    fmt, m, n, k = AfpFormat.parse(text), 53, 75, 130
    activation, scale = AfpFormat.parse(activation_format), round_scale(fmt, scale, "real")
    data, scales, _, weight = quantized(rng, n, k, fmt)
    x = 2 * rng.standard_normal((m, k)).astype(np.float32)  # some are clipped
    bias = rng.standard_normal(n).astype(np.float32)
    rows = x if fmt.kernel_class == "wide" else fake_quantize(x, activation, scale)
    exact = rows.astype(np.float64) @ weight.T + bias
    bound = (k + 4) * 2.0**-24 * (np.abs(rows) @ np.abs(weight).T + np.abs(bias))
    first = None
    for isa in _core.kernels.isa_names():
        for threads in (1, 3):
            y = _core.matmul(
                isa, threads, x, data, text, n, k, scales, 0, bias, "a8", -INF, INF,
                activation_format, scale,
            )  # fmt: skip
            assert (np.abs(y - exact) <= bound).all()
            first = y if first is None else first
            np.testing.assert_array_equal(y, first)


def test_a_static_format_adds_up_exactly_what_numpy_adds_up(isa):
    # Scales are powers of two and sums small: nothing is rounded after the activations.
    rng = np.random.default_rng(10)
    fmt, activation = AfpFormat(2, 4), AfpFormat(2, 5, signed=False)
    codes = encode(rng.standard_normal((20, 64)), fmt, 2.0**-5)
    x = rng.exponential(1.0, (7, 64)).astype(np.float32)
    y = _core.matmul(
        isa, 1, x, pack(codes, fmt.bits), "e2m4", 20, 64, np.full(20, 2.0**-5, np.float32), 0,
        None, "a8", -INF, INF, "ue2m5", 2.0**-6,
    )  # fmt: skip
    rows = codebook(activation)[encode(x, activation, 2.0**-6)]
    np.testing.assert_array_equal(y, rows @ codebook(fmt)[codes].T * 2.0**-11)


def test_a_static_row_with_nan_or_infinity_gives_nan_and_spares_the_others(isa):
    rng = np.random.default_rng(11)
    fmt = AfpFormat(2, 2)
    data, scales, _, _ = quantized(rng, 20, 32, fmt)
    x = rng.standard_normal((3, 32)).astype(np.float32)
    x[0, 5], x[2, 31] = np.nan, -np.inf
    y = _core.matmul(
        isa, 1, x, data, "e2m2", 20, 32, scales, 0, None, "a8", 0.0, INF, "e0m7", 0.03125
    )
    assert np.isnan(y[0]).all() and np.isnan(y[2]).all() and np.isfinite(y[1]).all()


def naive_conv(x, weight, groups, kernel, strides, dilations, pads, out):
    """float64 convolution by the definition; weight [n, taps * channels per group]."""
    batch, channels = x.shape[:2]
    size = channels // groups
    reach = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out, strides, kernel, dilations)]
    padded = np.zeros(
        (batch, channels, *[max(r, i + p) for r, i, p in zip(reach, x.shape[2:], pads)])
    )
    padded[(slice(None), slice(None), *[slice(p, p + i) for i, p in zip(x.shape[2:], pads)])] = x
    columns = np.empty((batch, groups, int(np.prod(kernel)), size, *out))
    for t, tap in enumerate(np.ndindex(*kernel)):
        window = [
            slice(j * d, j * d + (o - 1) * s + 1, s)
            for j, d, o, s in zip(tap, dilations, out, strides)
        ]
        columns[:, :, t] = padded[(slice(None), slice(None), *window)].reshape(
            batch, groups, size, *out
        )
    columns = columns.reshape(batch, groups, -1, int(np.prod(out)))
    grouped = weight.reshape(groups, -1, weight.shape[1])
    return np.einsum("bgkp,gnk->bgnp", columns, grouped).reshape(batch, -1, *out)


# channels in, channels out, groups, input, kernel, strides, dilations, pads before, output
SHAPES = [
    (3, 20, 1, (1, 13, 17), (1, 5, 5), (1, 2, 2), (1, 1, 1), (0, 1, 1), (1, 7, 9)),
    (6, 20, 1, (1, 9, 9), (1, 3, 3), (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 3, 3)),
    (3, 3, 3, (1, 16, 16), (1, 4, 4), (1, 3, 3), (1, 1, 1), (0, 2, 2), (1, 6, 6)),
    (3, 20, 1, (1, 13, 17), (1, 3, 3), (1, 2, 2), (1, 1, 1), (0, 1, 1), (1, 7, 9)),
    (8, 16, 1, (1, 9, 9), (1, 3, 3), (1, 1, 1), (1, 2, 2), (0, 2, 2), (1, 9, 9)),
    (16, 40, 1, (1, 7, 7), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 7, 7)),
    (24, 70, 1, (1, 8, 8), (1, 1, 1), (1, 2, 2), (1, 1, 1), (0, 0, 0), (1, 4, 4)),
    (16, 16, 16, (1, 13, 9), (1, 3, 3), (1, 2, 2), (1, 1, 1), (0, 1, 1), (1, 7, 5)),
    (6, 6, 6, (1, 11, 12), (1, 5, 5), (1, 1, 1), (1, 2, 2), (0, 4, 4), (1, 11, 12)),
    (8, 32, 2, (1, 6, 6), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 6, 6)),
    (12, 6, 3, (1, 6, 6), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 4, 4)),
    (4, 8, 4, (1, 6, 6), (1, 2, 3), (1, 3, 2), (1, 1, 1), (0, 0, 1), (1, 2, 3)),
    (1, 64, 1, (1, 49, 10), (1, 10, 4), (1, 2, 2), (1, 1, 1), (0, 4, 1), (1, 25, 5)),
    (2, 32, 1, (1, 1, 40), (1, 1, 7), (1, 1, 3), (1, 1, 1), (0, 0, 3), (1, 1, 14)),
    (4, 18, 1, (5, 6, 7), (3, 3, 3), (2, 1, 2), (1, 1, 1), (1, 1, 1), (3, 6, 4)),
    (8, 50, 1, (1, 40, 44), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 40, 44)),
    (16, 24, 1, (1, 60, 50), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 60, 50)),
    (4, 17, 1, (1, 14, 14), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 14, 14)),
    (32, 18, 1, (1, 9, 30), (1, 5, 3), (1, 2, 1), (1, 1, 4), (0, 6, 5), (1, 9, 32)),
    (8, 16, 1, (1, 1, 700), (1, 1, 5), (1, 1, 1), (1, 1, 1), (0, 0, 2), (1, 1, 700)),
    (40, 40, 40, (1, 33, 41), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 33, 41)),
    (24, 24, 24, (1, 20, 35), (1, 3, 3), (1, 2, 2), (1, 1, 1), (0, 1, 1), (1, 10, 18)),
    (3, 38, 1, (1, 50, 70), (1, 3, 3), (1, 2, 2), (1, 1, 1), (0, 1, 1), (1, 25, 35)),
    (1, 7, 1, (1, 30, 30), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 30, 30)),
    (4, 4, 4, (5, 6, 7), (3, 2, 3), (2, 1, 2), (1, 2, 1), (1, 1, 1), (3, 6, 4)),
]


@pytest.mark.parametrize("activations", ["f32", "a8", "a16"])
@pytest.mark.parametrize("text", ["e2m2", "e3m3", "e4m1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_equals_its_definition_on_every_isa(shape, text, activations):
    channels, n, groups, size, kernel, strides, dilations, pads, out = shape
    rng = np.random.default_rng(6)
    fmt, k = AfpFormat.parse(text), int(np.prod(kernel)) * channels // groups
    data, scale, _, weight = quantized(rng, n, k, fmt)
    x = np.maximum(rng.standard_normal((2, channels, *size)), -0.5).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    planar = (
        n // groups % 16 != 0 or channels // groups % 4 != 0
        if groups > 1
        else channels < 4 and k <= 64
    )
    planes = 0 if planar or fmt.kernel_class == "wide" else PLANES[activations]
    rows = rounded_rows(x.reshape(2, -1), planes).reshape(x.shape)
    geometry = groups, kernel, strides, dilations, pads, out
    exact = naive_conv(rows, weight, *geometry) + bias[:, None, None, None]
    bound = (
        (k + 4)
        * 2.0**-24
        * (naive_conv(np.abs(rows), np.abs(weight), *geometry) + np.abs(bias)[:, None, None, None])
    )
    first = None
    for isa in _core.kernels.isa_names():
        for threads in (1, 2):
            y = _core.conv(
                isa, threads, x, data, text, n, k, scale, bias, activations, -INF, 3.0,
                groups, kernel, strides, dilations, pads, out,
            )  # fmt: skip
            assert (np.abs(y - np.minimum(exact, 3.0)) <= bound).all()
            first = y if first is None else first
            np.testing.assert_array_equal(y, first)


@pytest.mark.parametrize(
    ("text", "activations"),
    [("e2m2", "f32"), ("e2m2", "a8"), ("e2m2", "a16"), ("e3m3", "a16"), ("e4m1", "a8")],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_residual_is_added_as_an_operator_behind_would(isa, shape, text, activations):
    channels, n, groups, size, kernel, strides, dilations, pads, out = shape
    rng = np.random.default_rng(13)
    fmt, k = AfpFormat.parse(text), int(np.prod(kernel)) * channels // groups
    data, scale, _, _ = quantized(rng, n, k, fmt)
    x = rng.standard_normal((2, channels, *size)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((2, n, *out)).astype(np.float32)
    residual[1, -1, -1, -1, -1] = np.nan

    def run(threads, low, high, residual):
        return _core.conv(
            isa, threads, x, data, text, n, k, scale, bias, activations, low, high,
            groups, kernel, strides, dilations, pads, out, residual=residual,
        )  # fmt: skip

    expected = clamp(run(1, -INF, INF, None) + residual, 0.0, 2.0)
    for threads in (1, 2):
        np.testing.assert_array_equal(run(threads, 0.0, 2.0, residual), expected)


@pytest.mark.parametrize(("activation_format", "scale"), STATIC)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_rounds_activations_to_a_static_format(shape, activation_format, scale):
    channels, n, groups, size, kernel, strides, dilations, pads, out = shape
    rng = np.random.default_rng(12)
    taps = int(np.prod(kernel))
    fmt, k = AfpFormat(2, 2), taps * channels // groups
    activation, scale = AfpFormat.parse(activation_format), round_scale(fmt, scale, "real")
    data, scales, _, weight = quantized(rng, n, k, fmt)
    x = rng.standard_normal((2, channels, *size)).astype(np.float32)
    of = channels, n, groups, taps
    planar = _core.conv_is_planar(*of) and not _core.conv_is_depthwise(*of)
    rows = x if planar else fake_quantize(x, activation, scale)
    geometry = groups, kernel, strides, dilations, pads, out
    exact = naive_conv(rows, weight, *geometry)
    bound = (k + 4) * 2.0**-24 * naive_conv(np.abs(rows), np.abs(weight), *geometry)
    first = None
    for isa in _core.kernels.isa_names():
        for threads in (1, 2):
            y = _core.conv(
                isa, threads, x, data, "e2m2", n, k, scales, None, "a8", -INF, INF,
                groups, kernel, strides, dilations, pads, out, activation_format, scale,
            )  # fmt: skip
            assert (np.abs(y - exact) <= bound).all()
            first = y if first is None else first
            np.testing.assert_array_equal(y, first)


def test_a_sample_does_not_depend_on_its_batch(isa):
    rng = np.random.default_rng(7)
    fmt = AfpFormat(2, 2)
    data, scale, _, _ = quantized(rng, 16, 72, fmt)
    x = rng.standard_normal((3, 8, 1, 9, 9)).astype(np.float32) * np.array([1, 100, 0.01]).reshape(
        3, 1, 1, 1, 1
    ).astype(np.float32)

    def run(batch):
        ones = (1, 1, 1)
        return _core.conv(
            isa, 1, batch, data, "e2m2", 16, 72, scale, None, "a8", -INF, INF,
            1, (1, 3, 3), ones, ones, (0, 1, 1), (1, 9, 9),
        )  # fmt: skip

    whole = run(x)
    for i in range(3):
        np.testing.assert_array_equal(run(x[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("text", FORMATS)
def test_unpack_equals_decode(text):
    rng = np.random.default_rng(8)
    fmt = AfpFormat.parse(text)
    data, scale, codes, _ = quantized(rng, 21, 30, fmt)
    np.testing.assert_array_equal(
        _core.unpack(data, text, 21, 30, scale, 0), decode(codes, fmt, scale.T)
    )


@pytest.mark.parametrize(
    ("activations", "activation_format", "scale", "message"),
    [
        ("a16", "e0m7", 0.5, "goes with a8, got a16"),
        ("a8", "e5m2", 0.5, "no format of activations: e5m2"),
        ("a8", "e0m7", 0.3, "no scale of activations: 0.3"),
    ],
)
def test_a_static_format_that_cannot_be_used_is_refused(
    activations, activation_format, scale, message
):
    codes = np.zeros((16, 4), np.uint8)
    x, scale_of_weights = np.zeros((1, 4), np.float32), np.ones(16, np.float32)
    with pytest.raises(ValueError, match=message):
        _core.matmul(
            "scalar", 1, x, pack(codes, 8), "e0m7", 16, 4, scale_of_weights, 0, None, activations, -INF, INF,
            activation_format, scale,
        )  # fmt: skip
