"""Kernels of layers that pass bytes to each other, against their definitions in NumPy."""

import itertools

import numpy as np
import pytest
from kernel_arrays import INF, Array, assert_same_bits, clamp, floats, fma, guarded, output
from kernel_rounding import encoded

from afpq import _core
from afpq.formats import AfpFormat

kernels = _core.kernels

FORMATS = ["e0m7", "ue1m7", "e2m4", "ue2m5", "e0m3"]
SCALES = [np.float32(1), np.float32(0.031738281)]  # steps, and another unit
SHAPES = [(rows, channels) for rows in (1, 2, 6, 48) for channels in (1, 7, 8, 9, 16, 17, 63, 64)]


@pytest.mark.parametrize("taps", [1, 2, 3, 8, 9, 10, 25, 49])
def test_depthwise_sums_are_exact(isa: str, taps: int) -> None:
    tiles = -(-taps // 4)
    limits = [127, 128, 254, 255, 2**14]
    for lines, columns, limit in itertools.product((1, 2, 3), (1, 2, 5), limits):
        blocks = 1 + (lines + columns + taps) % 4
        rng = np.random.default_rng(limit)
        lhs = rng.integers(0, 256, (taps, lines, columns, 16 * blocks + columns % 3), np.uint8)
        weights = rng.integers(-limit, limit, (blocks, 16, 4 * tiles), endpoint=True)
        weights[0, :, 0] = rng.choice([-limit, limit], 16)
        weights[:, :, taps:] = 0
        # [tile][pair][channel][tap of the pair]
        rhs = weights.reshape(blocks, 16, tiles, 2, 2).transpose(0, 2, 3, 1, 4)
        rhs = np.ascontiguousarray(rhs.reshape(blocks, tiles, 64), np.int16)
        exact = np.einsum(
            "tyxbc,bct->yxbc",
            lhs[..., : 16 * blocks].reshape(taps, lines, columns, blocks, 16).astype(np.int64),
            weights[:, :, :taps],
        )
        with output((lines * columns, 64), np.int32, 7) as dst:
            kernels.depthwise_s32_u8_s16(isa, guarded(lhs), guarded(rhs), dst)
            np.testing.assert_array_equal(dst[:, : 16 * blocks], exact.reshape(len(dst), -1))
            assert (dst[:, 16 * blocks :] == 7).all()


def rounded(value: Array, low: float, high: float, fmt: AfpFormat, scale: np.float32) -> Array:
    """The bytes of finished numbers."""
    value = np.where(np.isnan(value), np.float32(max(low, -1e30)), value)
    return encoded(clamp(value, low, high), fmt, scale)


def added(value: Array, residual: Array | None, zero: int, scale: float) -> Array:
    if residual is None:
        return value
    return fma(residual.astype(np.float32) - np.float32(zero), np.float32(scale), value)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_store_rounds_finished_rows_to_bytes(
    isa: str, with_residual: bool, text: str, scale: np.float32
) -> None:
    fmt = AfpFormat.parse(text)
    for rows, channels in SHAPES:
        rng = np.random.default_rng(rows + channels)
        src, row_scales, bias = floats(rng, rows, 64), floats(rng, rows), floats(rng, channels)
        if channels > 1:
            bias[0], bias[1] = np.nan, 1e30
        residual = rng.integers(0, 256, (rows, channels + 5), np.uint8) if with_residual else None
        low, high = [(-INF, INF), (0.0, 2.0), (-9.0, -1.0)][(rows + channels) % 3]
        value = fma(src[:, :channels], row_scales[:, None], bias)
        value = added(value, None if residual is None else residual[:, :channels], 128, 0.046875)
        args = [guarded(src), guarded(row_scales), guarded(bias)]
        args += [None if residual is None else guarded(residual), 128, 0.046875, low, high]
        with output((rows, channels + 5), np.uint8, 7) as dst:
            kernels.store_u8_f32(isa, *args, text, scale, dst)
            expected = rounded(value, low, high, fmt, scale)
            assert_same_bits(dst[:, :channels], expected, (rows, channels))
            assert (dst[:, channels:] == 7).all()
        with output((rows, 64), np.float32, 7) as kept:
            kernels.store_residual_f32(isa, *args, kept)
            assert_same_bits(kept[:, :channels], clamp(value, low, high), (rows, channels))
            assert (kept[:, channels:] == 7).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("planes", [1, 2])
def test_finish_is_combine_and_store(isa: str, planes: int, text: str, scale: np.float32) -> None:
    fmt = AfpFormat.parse(text)
    for rows, channels in SHAPES:
        rng = np.random.default_rng(rows + channels)
        sums = rng.integers(-(2**20), 2**20, (planes, rows, 64), np.int32)
        columns = rng.integers(-3000, 3000, (planes, channels), np.int32)
        scales, bias = np.abs(floats(rng, channels)) * np.float32(1e-5), floats(rng, channels)
        residual = rng.integers(0, 256, (rows, channels), np.uint8) if channels % 2 else None
        low, high = [(-INF, INF), (0.0, 2.0), (-9.0, -1.0)][(rows + channels) % 3]
        zero = int(rng.integers(0, 256))
        parts = (sums[:, :, :channels].astype(np.int64) - zero * columns[:, None]).astype(
            np.float32
        )
        product = parts[0] if planes == 1 else fma(parts[1], np.float32(256), parts[0])
        value = added(fma(product * scales, np.float32(0.3), bias), residual, 0, 0.5)
        with output((rows, channels), np.uint8) as dst:
            kernels.finish_u8_s32(
                isa, guarded(sums), guarded(columns), zero, guarded(scales), 0.3, guarded(bias),
                None if residual is None else guarded(residual), 0, 0.5, low, high, text, scale, dst,
            )  # fmt: skip
            assert_same_bits(dst, rounded(value, low, high, fmt, scale), (rows, channels))


@pytest.mark.parametrize("text", ["e0m7", "ue1m7"])
def test_ties_of_every_scale_go_to_the_even_byte(isa: str, text: str) -> None:
    """At and around every midpoint, for every scale of 8 significant bits: quotients are rounded as by a division."""
    fmt = AfpFormat.parse(text)
    steps = np.arange(-fmt.max_integer - 3 if fmt.signed else -3, fmt.max_integer + 3)
    for mantissa in range(128, 256):
        for exponent in (-150, -30, -9, 0, 40, 112):
            scale = np.float32(np.ldexp(float(mantissa), exponent - 7))
            if not np.isfinite(scale * np.float32(600)) or scale < 2.0**-126:
                continue
            at = ((steps + 0.5) * float(scale)).astype(np.float32)
            x = np.concatenate(
                [at, np.nextafter(at, np.float32(INF)), np.nextafter(at, np.float32(-INF))]
            )
            src = np.zeros((-(-x.size // 64), 64), np.float32)
            src.reshape(-1)[: x.size] = x
            ones, nothing = np.ones(len(src), np.float32), np.zeros(64, np.float32)
            dst = np.zeros(src.shape, np.uint8)
            kernels.store_u8_f32(isa, src, ones, nothing, None, 0, 0, -INF, INF, text, scale, dst)
            np.testing.assert_array_equal(dst, encoded(src, fmt, scale), err_msg=str(scale))
