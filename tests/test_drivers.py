"""Drivers (matrix product, convolution, table) against NumPy, on every ISA and with several threads."""

import numpy as np
import pytest
from driver_cases import PLANES, STATIC, check_everywhere, quantized, rounded_rows
from kernel_arrays import INF, clamp

from afpq import _core
from afpq.formats import AfpFormat, codebook, decode, encode, fake_quantize, round_scale
from afpq.packing import pack

FORMATS = ["e0m1", "e2m1", "e2m2", "e0m5", "e2m4", "e0m7", "e3m1", "e3m3", "e2m5", "e4m1", "e5m2"]


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
    residual=None,
):
    return _core.matmul(
        isa,
        threads,
        x,
        data,
        str(fmt),
        n,
        k,
        scale,
        group_size,
        bias,
        activations,
        low,
        high,
        residual=residual,
    )


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


@pytest.mark.parametrize("m", [1, 7, 53])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("text", ["e2m1", "e3m3", "e4m1"])
@pytest.mark.parametrize("activations", ["f32", "a8", "a16"])
def test_matmul_adds_a_residual_as_an_operator_behind_would(isa, activations, text, group_size, m):
    rng = np.random.default_rng(16)
    fmt, n, k = AfpFormat.parse(text), 75, 130
    data, scale, _, _ = quantized(rng, n, k, fmt, groups=5 if group_size else 1)
    x = rng.standard_normal((m, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    residual[-1, -1] = np.nan
    options = dict(activations=activations, bias=bias, group_size=group_size)

    expected = clamp(run_matmul(isa, x, data, fmt, n, k, scale, **options) + residual, -0.5, 2.0)
    for threads in (1, 2):
        options |= dict(threads=threads, low=-0.5, high=2.0, residual=residual)
        y = run_matmul(isa, x, data, fmt, n, k, scale, **options)
        np.testing.assert_array_equal(y, expected)


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
    args = x, data, text, n, k, scales, 0, bias, "a8", -INF, INF, activation_format, scale
    check_everywhere(lambda isa, threads: _core.matmul(isa, threads, *args), exact, bound, (1, 3))


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
