"""Kernels on channel planes against their definitions in NumPy: pixels in the lanes, and straight from floats."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_arrays import INF, Array, assert_same_bits, clamp, floats, fma, guarded, output
from kernel_rounding import SCALES, encoded, quantize, words_of

from afpq import _core
from afpq.formats import AfpFormat

kernels = _core.kernels


def pixel_sums(
    lhs: Array, taps: list[int], pixels: Array, rhs: Array, zero_point: int, channels: int
) -> Array:
    """lhs: [groups of a tap, pixels, steps], rhs: [tiles, 64] -> exact sums as float32 [channels, pixels]."""
    lhs = np.concatenate([lhs[:, tap + pixels] for tap in taps])
    weights = rhs.reshape(len(lhs), 16, -1)[:, :channels].astype(np.int64)
    return np.einsum("gxj,gcj->cx", lhs.astype(np.int64) - zero_point, weights).astype(np.float32)


# Taps and, of so many pixels, the pitch and the size of rows.
PIXEL_ROWS = [
    ([0], lambda n: (n, n)),
    ([0, 1, 7], lambda n: (9, 8)),
    ([5, 0], lambda n: (n // 2 + 1, n // 3 + 1)),
]


@pytest.mark.parametrize("taps, rows", PIXEL_ROWS, ids=["one tap", "3 taps", "2 taps"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 11, 40])
@pytest.mark.parametrize("kind", [1, 16, 17, 32, 33, 64, 128, "words", "pairs"])
def test_gemm_of_pixels_is_exact_and_rounds_once(
    isa: str, kind: Any, tiles: int, taps: list[int], rows: Callable[[int], tuple[int, int]]
) -> None:
    words = isinstance(kind, str)
    if not words and kind > kernels.a8_byte_limit(isa):
        return  # such weights go as words
    steps, planes = 2 if words else 4, 1 + (kind == "pairs")
    for pixels, channels in [(n, 1 + n % 16) for n in (*range(1, 36), 49, 196)]:
        rng = np.random.default_rng(pixels)
        pitch, size = rows(pixels)
        written = np.flatnonzero(np.arange(pixels) % pitch < size)
        shape = (4 * tiles // steps, -(-pixels // 16) * 16 + max(taps), steps)
        all_tiles = len(taps) * tiles
        if words:
            lhs = rng.integers(-(2**15), 2**15, shape, np.int16)
            rhs = rng.integers(-300 // tiles, 300 // tiles, (planes, all_tiles, 64), np.int16)
            zero_point, limit = int(rng.integers(-(2**15), 2**15)), 0
        else:
            lhs = rng.integers(0, 256, shape, np.uint8)
            rhs = rng.integers(-kind, min(kind, 127), (1, all_tiles, 64), np.int8, endpoint=True)
            zero_point, limit = int(rng.integers(0, 256)), kind
        columns = rhs.reshape(planes, -1, 16, steps).sum((1, 3), dtype=np.int32)[:, :channels]
        scales, bias = floats(rng, channels), floats(rng, channels)
        low, high = [(-INF, INF), (0.0, 6.0)][pixels % 2]
        value = pixel_sums(lhs, taps, written, rhs[0], zero_point, channels)
        if planes == 2:
            more = pixel_sums(lhs, taps, written, rhs[1], zero_point, channels)
            value = fma(more, np.float32(256), value)
        expected = fma(value * scales[:, None], np.float32(0.3), bias[:, None])
        run = kernels.gemm_pixels_f32_s16_s16 if words else kernels.gemm_pixels_f32_u8_s8
        args = [limit, zero_point, guarded(columns), guarded(scales), guarded(bias), 0.3, low, high]
        with output((channels, len(written) + 3), np.float32, 7) as dst:
            run(isa, guarded(lhs), taps, pixels, pitch, size, guarded(rhs), *args, dst)
            assert_same_bits(dst[:, : len(written)], clamp(expected, low, high), (pixels, channels))
            assert (dst[:, len(written) :] == 7).all()


@pytest.mark.parametrize("size", [1, 3, 7, 8, 15, 16, 17, 49, 70])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("gap", [0, 1, 4])
@pytest.mark.parametrize("rounding", ["a8", "a16", "e0m7", "ue2m5"])
def test_quantize_pixels_joins_channels(
    isa: str, rounding: str, gap: int, rows: int, size: int
) -> None:
    planes, text, scale = 1 + (rounding == "a16"), "", 0.0
    inverse_scale, zero_point = (9000.0, 32768) if rounding == "a16" else (100.0, 131)
    if rounding[0] != "a":
        text, scale = rounding, SCALES[1]
    run = (rows, size, size + gap)
    written = np.add.outer(np.arange(rows) * (size + gap), np.arange(size)).ravel()
    for channels in (4, 8, 12, 40):
        src = floats(np.random.default_rng(channels), channels, rows * size + channels % 8)
        used = src[:, : rows * size]
        q = quantize(used, inverse_scale, zero_point, planes)
        if text:
            q = encoded(used, AfpFormat.parse(text), scale)[None]
        pixels = written[-1] + 1 + channels % 3
        others = np.delete(np.arange(pixels), written)
        src = guarded(src)
        with output((channels // 2, pixels, 2), np.int16, 7) as dst:
            kernels.quantize_pixels_s16_f32(
                isa, src, *run, inverse_scale, zero_point, 256**planes, dst, text, scale
            )
            expected = words_of(q).reshape(-1, 2, rows * size).swapaxes(1, 2)
            assert_same_bits(dst[:, written], expected, channels)
            assert (dst[:, others] == 7).all()
        if planes == 1:
            with output((channels // 4, pixels, 4), np.uint8, 7) as dst:
                kernels.quantize_pixels_u8_f32(
                    isa, src, *run, inverse_scale, zero_point, dst, text, scale
                )
                expected = q.reshape(-1, 4, rows * size).swapaxes(1, 2)
                assert_same_bits(dst[:, written], expected, channels)
                assert (dst[:, others] == 7).all()


# rows and columns of an output plane, then of an input plane
PLANAR_SHAPES = [
    *[(2, n, 3, n + 2) for n in range(1, 28)], (1, 70, 3, 70), (7, 7, 7, 7), (9, 8, 9, 8), (14, 14, 14, 14),
    (11, 29, 11, 29), (5, 40, 4, 33), (6, 3, 2, 1), (4, 16, 20, 50), (12, 33, 30, 90),
]  # fmt: skip


@pytest.mark.parametrize("num_taps", [0, 1, 2, 8, 9, 10])
@pytest.mark.parametrize("column_step", [1, 2, 3])
@pytest.mark.parametrize("row_step", [1, 2])
def test_planar_is_one_chain_of_taps_that_are_0_outside(
    isa: str, row_step: int, column_step: int, num_taps: int
) -> None:
    for rows, columns, src_rows, src_columns in PLANAR_SHAPES:
        rng = np.random.default_rng(rows + columns)
        channels, shared = 1 + columns % 3, rows % 2
        src = floats(rng, 1 if shared else channels, 2, src_rows, src_columns)
        taps = rng.integers([0, -2, -3], [2, 3, 4], (num_taps, 3), np.int32)
        weights = rng.integers(-5, 6, (num_taps, 16)).astype(np.float32)
        total = np.zeros((channels, rows, columns), np.float32)
        for (plane, row, column), weight in zip(taps, weights[:, :channels, None, None]):
            y, x = np.arange(rows) * row_step + row, np.arange(columns) * column_step + column
            inside = np.outer((y >= 0) & (y < src_rows), (x >= 0) & (x < src_columns))
            at = np.ix_(y.clip(0, src_rows - 1), x.clip(0, src_columns - 1))
            tap = np.stack([channel[plane][at] for channel in src])
            total = fma(np.where(inside, tap, np.float32(0)), weight, total)
        scales, bias = floats(rng, channels), floats(rng, channels)
        low, high = [(-INF, INF), (0.0, 6.0)][rows % 2]
        expected = clamp(fma(total, scales[:, None, None], bias[:, None, None]), low, high)
        planes = [guarded(src), guarded(taps), guarded(weights), row_step, column_step]
        with output((channels, rows, columns + rows % 3), np.float32, 7) as dst:
            kernels.planar_f32(
                isa, *planes, guarded(scales), guarded(bias), low, high, columns, dst
            )
            assert_same_bits(dst[..., :columns], expected, (rows, columns, src_rows, src_columns))
            assert (dst[..., columns:] == 7).all()


@pytest.mark.parametrize("num_taps", [0, 1, 9, 27, 28])
def test_planar_rows_have_channels_in_the_lanes(isa: str, num_taps: int) -> None:
    for channels in (1, 7, 8, 9, 16, 17, 31, 32, 48, 60, 64):
        rng = np.random.default_rng(channels)
        pixels, tiles = 1 + channels % 14, num_taps // 4 + 1 + channels % 2
        taps = rng.integers(0, 90, num_taps, np.uint64)
        places = rng.integers(0, 70, pixels, np.uint64)
        src = floats(rng, int(max(taps, default=0)) + int(places.max()) + 1)
        weights = rng.integers(-9, 9, (-(-channels // 16), 4 * tiles, 16)).astype(np.float32)
        scales, bias = floats(rng, channels), floats(rng, channels)
        total = np.zeros((pixels, channels), np.float32)
        of_channels = np.moveaxis(weights, 0, 1).reshape(4 * tiles, -1)[:, :channels]
        for tap, weight in zip(taps.astype(int), of_channels):
            total = fma(src[tap + places.astype(int), None], weight, total)
        with output((pixels, 64), np.float32, 7) as dst:
            kernels.planar_rows_f32(
                isa, guarded(src), guarded(taps), guarded(places), guarded(weights), guarded(scales), guarded(bias),
                dst,
            )  # fmt: skip
            assert_same_bits(dst[:, :channels], fma(total, scales, bias), (channels, pixels))
            assert (dst[:, channels:] == 7).all()


@pytest.mark.parametrize("taps_kind", ["none", "one", "nine", "25", "3x3"])
@pytest.mark.parametrize("step", [16, 32])
def test_depthwise_meets_16_channels_with_their_own_weights(
    isa: str, step: int, taps_kind: str
) -> None:
    for columns in range(1, 18):
        rng = np.random.default_rng(columns)
        lines, line_step = 1 + columns % 5, (columns + 2) * step
        num_taps = {"none": 0, "one": 1, "nine": 9, "25": 25, "3x3": 9}[taps_kind]
        taps = rng.integers(0, 90, num_taps).tolist()
        if taps_kind == "3x3":
            taps = [5 + y * line_step + 16 * x for y in range(3) for x in range(3)]
        src = floats(rng, max(taps, default=0) + lines * line_step + 16)
        weights = rng.integers(-9, 9, (num_taps, 16)).astype(np.float32)
        scales, bias = floats(rng, 16), floats(rng, 16)
        low, high = [(-INF, INF), (0.0, 6.0)][columns % 2]
        at = np.arange(lines)[:, None, None] * line_step + np.arange(columns)[:, None] * step
        total = np.zeros((lines, columns, 16), np.float32)
        for tap, weight in zip(taps, weights):
            total = fma(src[tap + at + np.arange(16)], weight, total)
        with output((lines, columns, 16), np.float32, 7) as dst:
            kernels.depthwise_f32(
                isa, guarded(src), taps, guarded(weights), step, line_step, guarded(scales), guarded(bias),
                low, high, dst,
            )  # fmt: skip
            assert_same_bits(dst, clamp(fma(total, scales, bias), low, high), (columns, lines))


def test_residuals_are_added_then_clamped(isa: str) -> None:
    for count in range(1, 71):
        rng = np.random.default_rng(count)
        channels, stride = 1 + count % 5, count + count % 3
        src, before = floats(rng, channels, stride), floats(rng, channels, stride)
        src[0, 0], before[-1, count - 1] = np.nan, -np.inf
        low, high = [(-INF, INF), (0.0, 1.0)][count % 2]
        with output((channels, stride), np.float32, before) as dst:
            kernels.add_clamp_f32(isa, guarded(src), count, low, high, dst)
            expected = before.copy()
            expected[:, :count] = clamp((before + src)[:, :count], low, high)
            assert_same_bits(dst, expected, count)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_pick_takes_every_step_th_element(isa: str, num_rows: int, step: int) -> None:
    for count in (*range(1, 71), 112):
        rng = np.random.default_rng(count)
        src = floats(rng, num_rows, (count - 1) * step + 1 + count % 2 * (num_rows - 1))
        with output((num_rows, count + num_rows - 1), np.float32, 7) as dst:
            kernels.pick_f32(isa, guarded(src), step, count, dst)
            assert_same_bits(dst[:, :count], src[:, ::step][:, :count], count)
            assert (dst[:, count:] == 7).all()
