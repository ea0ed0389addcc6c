"""Convolutions of drivers against their definition, on every instruction set and number of threads."""

import numpy as np
import pytest
from driver_cases import PLANES, STATIC, check_everywhere, quantized, rounded_rows
from kernel_arrays import INF, clamp

from afpq import _core
from afpq.formats import AfpFormat, fake_quantize, round_scale


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
    # All that is read lies in the padding of depth.
    (4, 8, 1, (1, 6, 16), (1, 1, 1), (2, 1, 1), (1, 1, 1), (1, 0, 0), (1, 6, 16)),
    (4, 8, 1, (1, 6, 16), (1, 3, 3), (2, 1, 1), (1, 1, 1), (1, 1, 1), (1, 6, 16)),
    (16, 16, 16, (1, 6, 6), (1, 3, 3), (2, 1, 1), (1, 1, 1), (1, 1, 1), (1, 6, 6)),
]


# Of which threads share what is rounded before the products; of the last ones they pass channels to each other.
LARGE = [
    (16, 20, 1, (1, 64, 40), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 64, 40)),
    (12, 24, 1, (1, 70, 60), (1, 3, 3), (1, 2, 2), (1, 1, 1), (0, 1, 1), (1, 35, 30)),
    (64, 40, 1, (1, 24, 24), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 24, 24)),
    (64, 40, 1, (1, 7, 90), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 7, 90)),
    (3, 20, 1, (1, 75, 66), (1, 7, 7), (1, 2, 2), (1, 1, 1), (0, 3, 3), (1, 38, 33)),
    (3, 66, 1, (1, 60, 80), (1, 5, 5), (1, 1, 3), (1, 1, 2), (0, 2, 4), (1, 60, 25)),
    (2, 18, 1, (6, 24, 30), (3, 5, 3), (2, 1, 1), (1, 2, 1), (1, 4, 1), (3, 24, 30)),
    (32, 48, 1, (1, 16, 16), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 16, 16)),
    (28, 72, 1, (1, 23, 21), (1, 3, 3), (1, 2, 2), (1, 1, 1), (0, 1, 1), (1, 12, 11)),
    (64, 120, 1, (1, 16, 31), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 16, 31)),
    (40, 24, 1, (1, 21, 30), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 21, 30)),
]


def check_conv(shape, text, activations, samples, threads):
    channels, n, groups, size, kernel, strides, dilations, pads, out = shape
    rng = np.random.default_rng(6)
    fmt, k = AfpFormat.parse(text), int(np.prod(kernel)) * channels // groups
    data, scale, _, weight = quantized(rng, n, k, fmt)
    x = np.maximum(rng.standard_normal((samples, channels, *size)), -0.5).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    planar = (
        n // groups % 16 != 0 or channels // groups % 4 != 0
        if groups > 1
        else channels < 4 and k <= 64
    )
    planes = 0 if planar or fmt.kernel_class == "wide" else PLANES[activations]
    rows = rounded_rows(x.reshape(samples, -1), planes).reshape(x.shape)
    geometry = groups, kernel, strides, dilations, pads, out
    exact = naive_conv(rows, weight, *geometry) + bias[:, None, None, None]
    bound = (
        (k + 4)
        * 2.0**-24
        * (naive_conv(np.abs(rows), np.abs(weight), *geometry) + np.abs(bias)[:, None, None, None])
    )

    def run(isa, number):
        args = x, data, text, n, k, scale, bias, activations, -INF, 3.0
        return _core.conv(isa, number, *args, *geometry)

    check_everywhere(run, np.minimum(exact, 3.0), bound, threads)


@pytest.mark.parametrize("activations", ["f32", "a8", "a16"])
@pytest.mark.parametrize("text", ["e2m2", "e3m3", "e4m1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_equals_its_definition_on_every_isa(shape, text, activations):
    check_conv(shape, text, activations, samples=2, threads=(1, 2))


@pytest.mark.parametrize("activations", ["f32", "a8", "a16"])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_threads_share_a_single_sample(shape, activations):
    # Small samples of a batch are shared out whole instead.
    check_conv(shape, "e2m2", activations, samples=1, threads=(1, 2, 3, 7))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_taps_of_any_geometry(seed, depthwise):
    rng = np.random.default_rng(seed)
    kernel, strides, dilations = ((1, *map(int, rng.integers(1, 4, 2))) for _ in range(3))
    pads, out = (0, *map(int, rng.integers(0, 6, 2))), (1, *map(int, rng.integers(1, 9, 2)))
    out = out if depthwise else (*out[:2], 16)
    size = (1, *map(int, rng.integers(1, 40, 2)))
    channels, n = int(rng.choice([4, 8, 20])), int(rng.integers(1, 40))
    if depthwise:
        channels = n = 16 * int(rng.integers(1, 4))
    groups = channels if depthwise else 1
    fmt, k = AfpFormat(2, 2), int(np.prod(kernel)) * channels // groups
    data, scale, _, weight = quantized(rng, n, k, fmt)
    x = rng.standard_normal((5, channels, *size)).astype(np.float32)
    geometry = groups, kernel, strides, dilations, pads, out
    for activations in ("a8", "a16"):
        planes = 0 if depthwise else PLANES[activations]
        rows = rounded_rows(x.reshape(5, -1), planes).reshape(x.shape)
        exact = naive_conv(rows, weight, *geometry)
        bound = (k + 4) * 2.0**-24 * naive_conv(np.abs(rows), np.abs(weight), *geometry)
        args = x, data, "e2m2", n, k, scale, None, activations, -INF, INF, *geometry
        check_everywhere(
            lambda isa, threads, args=args: _core.conv(isa, threads, *args), exact, bound
        )


@pytest.mark.parametrize("activations", ["f32", "a8", "a16"])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("size", [(1, 0, 0), (1, 2, 0), (1, 0, 3)])
def test_an_input_that_is_all_padding_gives_the_bias(size, groups, activations):
    rng = np.random.default_rng(3)
    k = 9 * 16 // groups
    data, scale, _, _ = quantized(rng, 16, k, AfpFormat(2, 2))
    bias = rng.standard_normal(16).astype(np.float32)
    x, ones = np.zeros((3, 16, *size), np.float32), (1, 1, 1)
    args = x, data, "e2m2", 16, k, scale, bias, activations, -INF, INF
    geometry = groups, (1, 3, 3), ones, ones, (0, 2, 9), (1, 2, 16)
    exact = np.broadcast_to(bias[:, None, None, None], (3, 16, 1, 2, 16))
    check_everywhere(lambda isa, threads: _core.conv(isa, threads, *args, *geometry), exact, 0.0)


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
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_conv_rounds_activations_to_a_static_format(shape, activation_format, scale):
    channels, n, groups, size, kernel, strides, dilations, pads, out = shape
    rng = np.random.default_rng(12)
    taps = int(np.prod(kernel))
    fmt, k = AfpFormat(2, 2), taps * channels // groups
    activation, scale = AfpFormat.parse(activation_format), round_scale(fmt, scale, "real")
    data, scales, _, weight = quantized(rng, n, k, fmt)
    x = rng.standard_normal((2, channels, *size)).astype(np.float32)
    planar = _core.conv_is_planar(channels, n, groups, taps, True)
    rows = x if planar else fake_quantize(x, activation, scale)
    geometry = groups, kernel, strides, dilations, pads, out
    exact = naive_conv(rows, weight, *geometry)
    bound = (k + 4) * 2.0**-24 * naive_conv(np.abs(rows), np.abs(weight), *geometry)

    def run(isa, threads):
        args = x, data, "e2m2", n, k, scales, None, "a8", -INF, INF
        return _core.conv(isa, threads, *args, *geometry, activation_format, scale)

    check_everywhere(run, exact, bound)


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
