"""Every function of every kernel table against its definition in NumPy: equal bits, nothing touched beyond the arrays.

Inputs end where an inaccessible page begins, so that reading past an end is a crash. Outputs lie between canaries, one
element off the alignment of vectors.
"""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from afpq import _core
from afpq.formats import AfpFormat, all_formats, codebook, encode, magnitudes, round_scale

kernels = _core.kernels
Array = npt.NDArray[Any]
INF = float("inf")
MR, PANEL, TILE = 6, 64, 64
CANARY = 0xA5


def guarded(values: npt.ArrayLike, dtype: npt.DTypeLike = None) -> Array:
    """A copy that ends at the end of a page; the next page cannot be read."""
    array = np.ascontiguousarray(values, dtype)
    if array.nbytes == 0 or not hasattr(ctypes.CDLL(None), "mprotect"):
        return array
    page = mmap.PAGESIZE
    used = -(-array.nbytes // page) * page
    region = mmap.mmap(-1, used + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + used), page, 0) == 0
    copy = np.frombuffer(region, array.dtype, array.size, used - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


@contextmanager
def output(shape: tuple[int, ...], dtype: npt.DTypeLike, before: Any = 0) -> Iterator[Array]:
    """An array that holds `before`, between canaries that must be alive at the end."""
    dtype = np.dtype(dtype)
    pad, size = 128 + dtype.itemsize, int(np.prod(shape)) * dtype.itemsize
    memory = np.full(size + 2 * pad, CANARY, np.uint8)
    array = memory[pad : pad + size].view(dtype).reshape(shape)
    array[...] = before
    yield array
    assert (memory[:pad] == CANARY).all(), "written before the output"
    assert (memory[pad + size :] == CANARY).all(), "written after the output"


def assert_same_bits(actual: Array, expected: Array, note: object = "") -> None:
    """Equal, with -0 unlike 0 and any NaN like any other."""
    np.testing.assert_array_equal(actual, expected, err_msg=str(note))
    if actual.dtype == np.float32:
        number = ~np.isnan(expected)
        signs = np.signbit(actual)[number] == np.signbit(expected)[number]
        assert signs.all(), f"a zero of the other sign {note}"


def fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c with one rounding: the product is exact in float64, the sum is rounded to odd there."""
    product, addend = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(INF, error)), total).astype(np.float32)


def clamp(values: Array, low: float, high: float) -> Array:
    low32, high32 = np.float32(low), np.float32(high)
    values = np.where(low32 > values, low32, values)
    return np.where(high32 < values, high32, values)


def floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


# expand


def tables_of(bits: int, dtype: type) -> dict[str, Array]:
    """256-entry tables, periodic in 2^bits: each format's, and one with every entry different where it can be."""
    result = {"any": np.random.default_rng(bits).permutation(256)[: 1 << bits] - 128}
    for fmt in (*all_formats(), *all_formats(signed=False)):
        if fmt.bits == bits:
            result[str(fmt)] = codebook(fmt) if dtype is np.float32 else codebook(fmt) & 255
    return {name: np.tile(t, 256 >> bits).astype(dtype) for name, t in result.items()}


def codes_of(stream: Array, bits: int) -> Array:
    planes = np.unpackbits(stream, bitorder="little").reshape(-1, bits)
    return planes @ (1 << np.arange(bits))


@pytest.mark.parametrize("num_tiles", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("bits", range(2, 9))
def test_expand_looks_codes_up_in_the_table(isa: str, bits: int, num_tiles: int) -> None:
    stream = np.random.default_rng(num_tiles).integers(0, 256, num_tiles * 8 * bits, np.uint8)
    src, codes = guarded(stream), codes_of(stream, bits).reshape(num_tiles, TILE)
    for name, table in tables_of(bits, np.int8).items():
        with output((num_tiles, TILE), np.int8) as dst:
            kernels.expand_s8_afp(isa, src, bits, guarded(table), dst)
            assert_same_bits(dst, table[codes], name)


@pytest.mark.parametrize("num_tiles", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("bits", range(2, 9))
def test_expand_to_words_pairs_steps(isa: str, bits: int, num_tiles: int) -> None:
    stream = np.random.default_rng(num_tiles).integers(0, 256, num_tiles * 8 * bits, np.uint8)
    src, codes = guarded(stream), codes_of(stream, bits).reshape(num_tiles, 16, 2, 2)
    any_words = np.random.default_rng(bits).integers(-(2**15), 2**15, 1 << bits)
    formats = [codebook(f) for f in all_formats() if f.bits == bits and f.max_integer < 2**15]
    for numbers in (any_words, any_words >> 8, *formats):
        table = np.tile(numbers, 256 >> bits).astype(np.int16)
        with output((num_tiles, TILE), np.int16) as dst:
            kernels.expand_s16_afp(isa, src, bits, guarded(table), dst)
            assert_same_bits(dst, table[codes.swapaxes(1, 2)].reshape(num_tiles, TILE))


@pytest.mark.parametrize("num_tiles", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("bits", range(2, 9))
def test_expand_to_floats_transposes_tiles(isa: str, bits: int, num_tiles: int) -> None:
    stream = np.random.default_rng(num_tiles).integers(0, 256, num_tiles * 8 * bits, np.uint8)
    src, codes = guarded(stream), codes_of(stream, bits).reshape(num_tiles, 16, 4)
    for name, table in tables_of(bits, np.float32).items():
        with output((num_tiles, TILE), np.float32) as dst:
            kernels.expand_f32_afp(isa, src, bits, guarded(table), dst)
            assert_same_bits(dst, table[codes.swapaxes(1, 2)].reshape(num_tiles, TILE), name)


# gemm


GEMM_SHAPES = [(1, 0), (1, 1), (1, 2), (1, 7), (2, 3), (3, 1), (9, 2)]  # taps, tiles a tap


LIMITS = [1, 16, 17, 32, 33, 64, 65, 127, 128]  # of |rhs|; around those where kernels change


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("num_blocks", range(1, 5))
@pytest.mark.parametrize("num_rows", range(1, MR + 1))
def test_gemm_of_bytes_is_exact(isa: str, num_rows: int, num_blocks: int, accumulate: bool) -> None:
    rng = np.random.default_rng(num_rows * 10 + num_blocks)
    for (taps, tiles), limit in itertools.product(GEMM_SHAPES, LIMITS):
        lhs = rng.integers(0, 256, (taps, num_rows, 4 * tiles), np.uint8)
        rhs = rng.integers(
            -limit, min(limit, 127), (num_blocks, taps * tiles + 2, TILE), endpoint=True
        )
        before = rng.integers(-1000, 1000, (num_rows, PANEL))
        used = rhs[:, : taps * tiles].reshape(num_blocks, taps, tiles, 16, 4)
        steps = lhs.reshape(taps, num_rows, tiles, 4).astype(np.int64)
        sums = np.einsum("trij,bticj->rbc", steps, used).reshape(num_rows, -1)
        expected = before.copy()
        expected[:, : 16 * num_blocks] = sums + accumulate * before[:, : 16 * num_blocks]
        with output((num_rows, PANEL), np.int32, before) as dst:
            kernels.gemm_s32_u8_s8(isa, guarded(lhs), guarded(rhs, np.int8), limit, accumulate, dst)
            assert_same_bits(dst, expected, (taps, tiles, limit))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 6])
def test_gemm_of_bytes_does_not_saturate(isa: str, num_rows: int, sign: int, limit: int) -> None:
    lhs = np.full((1, num_rows, 16384), 255, np.uint8)
    weight = min(sign * limit, 127)
    rhs = np.full((4, 4096, TILE), weight, np.int8)
    with output((num_rows, PANEL), np.int32) as dst:
        kernels.gemm_s32_u8_s8(isa, lhs, rhs, limit, False, dst)
        assert (dst == 255 * weight * 16384).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("num_blocks", range(1, 5))
@pytest.mark.parametrize("num_rows", range(1, MR + 1))
def test_gemm_of_words_is_exact_up_to_whole_turns(
    isa: str, num_rows: int, num_blocks: int, accumulate: bool
) -> None:
    rng = np.random.default_rng(num_rows * 10 + num_blocks)
    for taps, tiles in [*GEMM_SHAPES, (1, 500)]:  # the last one goes beyond 32 bits
        lhs = rng.integers(-(2**15), 2**15, (taps, num_rows, 4 * tiles), np.int16)
        rhs = rng.integers(-(2**15) + 1, 2**15, (num_blocks, taps * tiles + 2, TILE), np.int16)
        before = rng.integers(-(2**31), 2**31, (num_rows, PANEL))
        used = rhs[:, : taps * tiles].reshape(num_blocks, taps, tiles, 2, 16, 2).astype(np.int64)
        steps = lhs.reshape(taps, num_rows, tiles, 2, 2).astype(np.int64)
        sums = np.einsum("trihj,btihcj->rbc", steps, used).reshape(num_rows, -1)
        expected = before.copy()
        expected[:, : 16 * num_blocks] = sums + accumulate * before[:, : 16 * num_blocks]
        with output((num_rows, PANEL), np.int32, before.astype(np.int32)) as dst:
            kernels.gemm_s32_s16_s16(isa, guarded(lhs), guarded(rhs), accumulate, dst)
            assert_same_bits(dst, expected.astype(np.int32), (taps, tiles))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("num_blocks", range(1, 5))
@pytest.mark.parametrize("num_rows", range(1, MR + 1))
def test_gemm_of_floats_is_one_chain(
    isa: str, num_rows: int, num_blocks: int, accumulate: bool
) -> None:
    rng = np.random.default_rng(num_rows * 10 + num_blocks)
    for taps, tiles in GEMM_SHAPES:
        lhs = floats(rng, taps, num_rows, 4 * tiles)
        rhs = floats(rng, num_blocks, taps * tiles + 2, TILE)
        before = floats(rng, num_rows, PANEL)
        steps = rhs.reshape(num_blocks, -1, 16).transpose(1, 0, 2).reshape(-1, 16 * num_blocks)
        sums = before[:, : 16 * num_blocks] * np.float32(accumulate)
        for t, k in np.ndindex(taps, 4 * tiles):
            sums = fma(lhs[t, :, k, None], steps[t * 4 * tiles + k], sums)
        expected = before.copy()
        expected[:, : 16 * num_blocks] = sums if accumulate else sums + np.float32(0)
        with output((num_rows, PANEL), np.float32, before) as dst:
            kernels.gemm_f32_f32_f32(isa, guarded(lhs), guarded(rhs), accumulate, dst)
            assert_same_bits(dst, expected, (taps, tiles))


# floats to bytes


@pytest.mark.parametrize("count", [*range(71), 200])
def test_range_spans_zero_and_all_elements(isa: str, count: int) -> None:
    src = floats(np.random.default_rng(count), count)
    for shift in (0, 10, -10):
        shifted = src + np.float32(shift)
        low, high, finite = kernels.range_f32(isa, guarded(shifted))
        assert (low, high) == (shifted.min(initial=0), shifted.max(initial=0))
        assert finite


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_range_finds_a_special_value_wherever_it_is(isa: str, special: float) -> None:
    for count in (1, 8, 16, 17, 70, 130):
        for at in range(count):
            src = np.ones(count, np.float32)
            src[at] = special
            assert not kernels.range_f32(isa, guarded(src))[2], (count, at)


def test_range_of_negative_zeros_is_positive_zero(isa: str) -> None:
    low, high, finite = kernels.range_f32(isa, guarded(np.full(70, -0.0, np.float32)))
    assert not np.signbit(low) and not np.signbit(high) and finite


def quantize(x: Array, inverse_scale: float, zero_point: int, num_planes: int) -> Array:
    """uint8 [num_planes, ...]"""
    rounded = np.rint(x * np.float32(inverse_scale)).astype(np.int64) + zero_point
    q = np.clip(rounded, 0, 255 if num_planes == 1 else 65535)
    return np.stack([q] if num_planes == 1 else [q >> 8, q & 255]).astype(np.uint8)


# Beyond both ends, and many ties.
QUANTIZERS = [(1, 100.0, 131), (1, 2.0, 0), (1, 30000.0, 255), (2, 9000.0, 32768), (2, 2.0, 65535)]


@pytest.mark.parametrize(("planes", "inverse_scale", "zero_point"), QUANTIZERS)
def test_quantize_rounds_and_clamps(
    isa: str, planes: int, inverse_scale: float, zero_point: int
) -> None:
    for count in (*range(71), 128, 131):
        src = floats(np.random.default_rng(count), count)
        src[::3] = np.rint(src[::3] * 8) / 4
        src = np.clip(src, -65536 / inverse_scale, 65536 / inverse_scale)
        with output((planes, count), np.uint8) as dst:
            kernels.quantize_u8_f32(isa, guarded(src), inverse_scale, zero_point, dst)
            assert_same_bits(dst, quantize(src, inverse_scale, zero_point, planes), count)


def words_of(planes: Array) -> Array:
    """What words hold of the bytes that `quantize` gives."""
    if len(planes) == 1:
        return planes[0].astype(np.int16)
    return (planes[0].astype(np.int32) * 256 + planes[1] - 32768).astype(np.int16)


@pytest.mark.parametrize(("planes", "inverse_scale", "zero_point"), QUANTIZERS)
def test_quantize_to_words_holds_the_same_numbers(
    isa: str, planes: int, inverse_scale: float, zero_point: int
) -> None:
    for count in (*range(71), 128, 131):
        src = floats(np.random.default_rng(count), count)
        src[::3] = np.rint(src[::3] * 8) / 4
        src = np.clip(src, -65536 / inverse_scale, 65536 / inverse_scale)
        with output((count,), np.int16) as dst:
            kernels.quantize_s16_f32(isa, guarded(src), inverse_scale, zero_point, 256**planes, dst)
            assert_same_bits(dst, words_of(quantize(src, inverse_scale, zero_point, planes)), count)


@pytest.mark.parametrize("count", [1, 3, 7, 8, 15, 16, 17, 49, 70])
@pytest.mark.parametrize("planes", [1, 2])
def test_quantize_transpose_to_words_makes_rows_of_channels(
    isa: str, planes: int, count: int
) -> None:
    inverse_scale, zero_point = (100.0, 131) if planes == 1 else (9000.0, 32768)
    for channels in (*range(1, 42), 63, 64, 96, 144):
        src = floats(np.random.default_rng(channels), channels, count + channels % 2 * 5)
        q = quantize(src[:, :count], inverse_scale, zero_point, planes)
        with output((count, channels), np.int16) as dst:
            kernels.quantize_transpose_s16_f32(
                isa, guarded(src), inverse_scale, zero_point, 256**planes, dst
            )
            assert_same_bits(dst, words_of(q).T, channels)


@pytest.mark.parametrize("planes", [1, 2])
def test_nan_quantizes_to_zero(isa: str, planes: int) -> None:
    src = np.array([np.nan, np.inf, -np.inf, 1.0] * 10, np.float32)
    with output((planes, 40), np.uint8, 7) as dst:
        kernels.quantize_u8_f32(isa, guarded(src), 0.0, 0, dst)
        assert (dst == 0).all()


@pytest.mark.parametrize("count", [1, 3, 7, 8, 15, 16, 17, 49, 70])
@pytest.mark.parametrize("planes", [1, 2])
def test_quantize_transpose_makes_rows_of_channels(isa: str, planes: int, count: int) -> None:
    inverse_scale, zero_point = (100.0, 131) if planes == 1 else (9000.0, 32768)
    for channels in (*range(1, 42), 63, 64, 96, 144):
        src = floats(np.random.default_rng(channels), channels, count + channels % 2 * 5)
        q = quantize(src[:, :count], inverse_scale, zero_point, planes)
        with output((planes, count, channels), np.uint8) as dst:
            kernels.quantize_transpose_u8_f32(isa, guarded(src), inverse_scale, zero_point, dst)
            assert_same_bits(dst, q.swapaxes(1, 2), channels)


# Formats of activations: integers that fit a byte, with a mantissa.
BYTE_FORMATS = [fmt for fmt in (*all_formats(), *all_formats(signed=False)) if fmt.fits_activations]
SCALES = round_scale(AfpFormat(0, 1), [2.0**-126, 0.00731, 0.6667, 1.0, 3.1, 2.0**100], "real")


def encoded(x: Array, fmt: AfpFormat, scale: np.float32) -> Array:
    """The bytes of the integers of the definition's codes."""
    integers = codebook(fmt)[encode(x, fmt, scale)]
    return (integers + (128 if fmt.signed else 0)).astype(np.uint8)


def hard_cases(fmt: AfpFormat, scale: np.float32) -> Array:
    """Every value, every midpoint and its neighbours, both signs, and values beyond the largest."""
    levels = magnitudes(fmt)
    points = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, levels[-1:] * 1.5])
    x = (points * scale).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(INF))])
    largest = np.array([0.0, 3e38, 1e-45], np.float32)
    return np.concatenate([x, -x, largest, -largest])


@pytest.mark.parametrize("fmt", BYTE_FORMATS, ids=str)
def test_quantize_to_a_format_equals_encode(isa: str, fmt: AfpFormat) -> None:
    for scale in SCALES:
        src = hard_cases(fmt, scale)
        with output((1, src.size), np.uint8) as dst:
            kernels.quantize_u8_f32(isa, guarded(src), 0.0, 0, dst, str(fmt), scale)
            assert_same_bits(dst[0], encoded(src, fmt, scale), scale)
        with output((src.size,), np.int16) as words:
            kernels.quantize_s16_f32(isa, guarded(src), 0.0, 0, 256, words, str(fmt), scale)
            assert_same_bits(words, encoded(src, fmt, scale).astype(np.int16), scale)


@pytest.mark.parametrize("count", [1, 7, 8, 16, 17, 49])
@pytest.mark.parametrize("text", ["e0m7", "e2m4", "ue1m7", "ue2m5"])
def test_quantize_transpose_to_a_format_equals_encode(isa: str, text: str, count: int) -> None:
    fmt = AfpFormat.parse(text)
    for channels in (*range(1, 42), 63, 64, 96, 144):
        src = floats(np.random.default_rng(channels), channels, count + channels % 2 * 5)
        with output((1, count, channels), np.uint8) as dst:
            kernels.quantize_transpose_u8_f32(isa, guarded(src), 0.0, 0, dst, text, SCALES[1])
            assert_same_bits(dst[0], encoded(src[:, :count].T, fmt, SCALES[1]), channels)
        with output((count, channels), np.int16) as words:
            kernels.quantize_transpose_s16_f32(
                isa, guarded(src), 0.0, 0, 256, words, text, SCALES[1]
            )
            assert_same_bits(words, dst[0].astype(np.int16), channels)


def test_other_formats_are_no_formats_of_activations() -> None:
    for fmt in {*all_formats(), *all_formats(signed=False)} - set(BYTE_FORMATS):
        with pytest.raises(ValueError, match="no such format of activations"):
            kernels.quantize_u8_f32(
                "scalar", np.zeros(1, np.float32), 0.0, 0, np.zeros((1, 1), np.uint8), str(fmt), 1.0
            )


def test_nan_quantizes_to_the_lowest_integer_of_a_format(isa: str) -> None:
    src = np.full(40, np.nan, np.float32)
    for text, lowest in (("e0m7", 1), ("e2m4", 4), ("ue2m5", 0)):
        with output((1, 40), np.uint8, 7) as dst:
            kernels.quantize_u8_f32(isa, guarded(src), 0.0, 0, dst, text, 1.0)
            assert (dst == lowest).all()


@pytest.mark.parametrize("count", [1, 3, 7, 8, 15, 16, 17, 49, 70])
@pytest.mark.parametrize("rounding", ["a8", "a16", "e0m7", "ue2m5"])
def test_quantize_pixels_joins_channels(isa: str, rounding: str, count: int) -> None:
    planes, text, scale = 1 + (rounding == "a16"), "", 0.0
    inverse_scale, zero_point = (9000.0, 32768) if rounding == "a16" else (100.0, 131)
    if rounding[0] != "a":
        text, scale = rounding, SCALES[1]
    for channels in (4, 8, 12, 40):
        src = floats(np.random.default_rng(channels), channels, count + channels % 8)
        used = src[:, :count]
        q = quantize(used, inverse_scale, zero_point, planes)
        if text:
            q = encoded(used, AfpFormat.parse(text), scale)[None]
        stride = count + channels % 3
        src = guarded(src)
        with output((channels // 2, stride, 2), np.int16, 7) as dst:
            kernels.quantize_pixels_s16_f32(
                isa, src, count, inverse_scale, zero_point, 256**planes, dst, text, scale
            )
            expected = words_of(q).reshape(-1, 2, count).swapaxes(1, 2)
            assert_same_bits(dst[:, :count], expected, channels)
            assert (dst[:, count:] == 7).all()
        if planes == 1:
            with output((channels // 4, stride, 4), np.uint8, 7) as dst:
                kernels.quantize_pixels_u8_f32(
                    isa, src, count, inverse_scale, zero_point, dst, text, scale
                )
                expected = q.reshape(-1, 4, count).swapaxes(1, 2)
                assert_same_bits(dst[:, :count], expected, channels)
                assert (dst[:, count:] == 7).all()


@pytest.mark.parametrize("count", [1, 3, 7, 8, 15, 16, 17, 49, 70])
def test_transpose_makes_rows_of_channels(isa: str, count: int) -> None:
    for channels in (*range(1, 42), 63, 64, 96, 144):
        src = floats(np.random.default_rng(channels), channels, count + channels % 2 * 5)
        with output((count, channels), np.float32) as dst:
            kernels.transpose_f32(isa, guarded(src), dst)
            assert_same_bits(dst, src[:, :count].T, channels)


# products with pixels in the lanes


def pixel_sums(lhs: Array, rhs: Array, zero_point: int, channels: int) -> Array:
    """lhs: [groups, pixels, steps], rhs: [tiles, 64] -> exact sums as float32 [channels, pixels]."""
    weights = rhs.reshape(len(lhs), 16, -1)[:, :channels].astype(np.int64)
    return np.einsum("gxj,gcj->cx", lhs.astype(np.int64) - zero_point, weights).astype(np.float32)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 11, 40])
@pytest.mark.parametrize("kind", [1, 16, 17, 32, 33, 64, 128, "words", "pairs"])
def test_gemm_of_pixels_is_exact_and_rounds_once(isa: str, kind: Any, tiles: int) -> None:
    words = isinstance(kind, str)
    if not words and kind > (64 if isa == "avx2" else 128):
        return  # beyond what the table says it takes as bytes
    steps, planes = 2 if words else 4, 1 + (kind == "pairs")
    for pixels, channels in [(n, 1 + n % 16) for n in (*range(1, 36), 49, 196)]:
        rng = np.random.default_rng(pixels)
        shape = (4 * tiles // steps, -(-pixels // 16) * 16, steps)
        if words:
            lhs = rng.integers(-(2**15), 2**15, shape, np.int16)
            rhs = rng.integers(-300 // tiles, 300 // tiles, (planes, tiles, 64), np.int16)
            zero_point, limit = int(rng.integers(-(2**15), 2**15)), 0
        else:
            lhs = rng.integers(0, 256, shape, np.uint8)
            rhs = rng.integers(-kind, min(kind, 127), (1, tiles, 64), endpoint=True).astype(np.int8)
            zero_point, limit = int(rng.integers(0, 256)), kind
        columns = rhs.reshape(planes, -1, 16, steps).sum((1, 3), dtype=np.int32)[:, :channels]
        scales, bias = floats(rng, channels), floats(rng, channels)
        low, high = [(-INF, INF), (0.0, 6.0)][pixels % 2]
        value = pixel_sums(lhs[:, :pixels], rhs[0], zero_point, channels)
        if planes == 2:
            more = pixel_sums(lhs[:, :pixels], rhs[1], zero_point, channels)
            value = fma(more, np.float32(256), value)
        expected = fma(value * scales[:, None], np.float32(0.3), bias[:, None])
        run = kernels.gemm_pixels_f32_s16_s16 if words else kernels.gemm_pixels_f32_u8_s8
        args = [limit, zero_point, guarded(columns), guarded(scales), guarded(bias), 0.3, low, high]
        with output((channels, pixels + 3), np.float32, 7) as dst:
            run(isa, guarded(lhs), guarded(rhs), pixels, *args, dst)
            assert_same_bits(dst[:, :pixels], clamp(expected, low, high), (pixels, channels))
            assert (dst[:, pixels:] == 7).all()


# sums to floats


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rhs_planes", [1, 2])
@pytest.mark.parametrize("lhs_planes", [1, 2])
def test_combine_joins_planes(isa: str, lhs_planes: int, rhs_planes: int, accumulate: bool) -> None:
    for channels in range(1, PANEL + 1):
        rng = np.random.default_rng(channels)
        rows = 1 + channels % MR
        sums = rng.integers(-(2**29), 2**29, (rhs_planes, rows * lhs_planes, PANEL), np.int32)
        columns = rng.integers(-(2**21), 2**21, (rhs_planes, channels), np.int32)
        zero_points = rng.integers(0, 256**lhs_planes, rows, np.int32)
        scales, before = floats(rng, channels), floats(rng, rows, PANEL)
        parts = [zero_points] if lhs_planes == 1 else [zero_points >> 8, zero_points & 255]
        shift = np.stack(parts, 1).reshape(-1, 1) * columns[:, None]
        exact = (sums[..., :channels] - shift).astype(np.float32)
        exact = exact.reshape(rhs_planes, rows, lhs_planes, channels)
        c256 = np.float32(256)
        planes = exact[:, :, 0] if lhs_planes == 1 else fma(exact[:, :, 0], c256, exact[:, :, 1])
        value = planes[0] if rhs_planes == 1 else fma(planes[1], c256, planes[0])
        expected = before.copy()
        old = before[:, :channels]
        expected[:, :channels] = fma(value, scales, old) if accumulate else value * scales
        with output((rows, PANEL), np.float32, before) as dst:
            kernels.combine_f32_s32(
                isa, guarded(sums), guarded(columns), guarded(zero_points), guarded(scales),
                accumulate, dst,
            )  # fmt: skip
            assert_same_bits(dst, expected, channels)


@pytest.mark.parametrize(("low", "high"), [(-INF, INF), (0.0, 6.0), (-0.5, 0.25)])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 8, 15, 16, 17, 33, 48])
def test_store_writes_rows_or_columns(isa: str, rows: int, low: float, high: float) -> None:
    for channels in range(1, PANEL + 1):
        rng = np.random.default_rng(channels)
        src, scales, bias = floats(rng, rows, PANEL), floats(rng, rows), floats(rng, channels)
        src.flat[:: 1 + channels] = [np.nan, np.inf, -np.inf, -0.0][channels % 4]
        bias[::2] = -0.0
        with np.errstate(invalid="ignore"):
            expected = clamp(fma(src[:, :channels], scales[:, None], bias), low, high)
        args = [guarded(src), guarded(scales), guarded(bias), low, high]
        with output((rows, channels + 3), np.float32, 7) as dst:
            kernels.store_f32(isa, *args, channels + 3, 1, dst.reshape(-1))
            assert_same_bits(dst[:, :channels], expected, channels)
            assert (dst[:, channels:] == 7).all(), channels
        with output((channels, rows + 3), np.float32, 7) as dst:
            kernels.store_f32(isa, *args, 1, rows + 3, dst.reshape(-1))
            assert_same_bits(dst[:, :rows], expected.T, channels)
            assert (dst[:, rows:] == 7).all(), channels


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


# choice of a table


def test_scalar_is_always_there_and_last() -> None:
    assert kernels.isa_names()[-1] == "scalar"


def test_an_unknown_isa_is_an_error_that_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'sse9' .* scalar"):
        kernels.range_f32("sse9", np.zeros(1, np.float32))


def active_isa(value: str) -> subprocess.CompletedProcess[str]:
    code = "from afpq import _core; print(_core.kernels.active_isa())"
    environment = {**os.environ, "AFPQ_ISA": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_environment_forces_a_table(isa: str) -> None:
    assert active_isa(isa).stdout.strip() == isa


def test_without_a_choice_the_best_table_runs() -> None:
    assert active_isa("").stdout.strip() == kernels.isa_names()[0]


def test_an_unknown_choice_in_the_environment_is_an_error() -> None:
    error = active_isa("sse9").stderr
    assert "AFPQ_ISA: 'sse9'" in error and ", ".join(kernels.isa_names()) in error


def test_shapes_are_checked_before_a_kernel_runs(isa: str) -> None:
    table = np.zeros(256, np.int8)
    with pytest.raises(ValueError, match=r"8 \* bits bytes"):
        kernels.expand_s8_afp(isa, np.zeros(31, np.uint8), 4, table, np.zeros((1, 64), np.int8))
    with pytest.raises(ValueError, match=r"2\.\.8"):
        kernels.expand_s8_afp(isa, np.zeros(72, np.uint8), 9, table, np.zeros((1, 64), np.int8))
