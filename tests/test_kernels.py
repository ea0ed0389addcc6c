"""Every function of every kernel table against its definition in NumPy: equal bits, nothing touched beyond arrays.

Those that round floats, and those that work on channel planes, have files of their own.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from kernel_arrays import INF, Array, assert_same_bits, clamp, floats, fma, guarded, output

from afpq import _core
from afpq.formats import all_formats, codebook
from afpq.packing import pack

kernels = _core.kernels
MR, PANEL, TILE = 6, 64, 64


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


ROWS = [*range(1, MR + 1), MR + 1, 2 * MR, 3 * MR - 2]
GEMM_SHAPES = [(1, 0), (1, 1), (1, 2), (1, 7), (2, 3), (3, 1), (9, 2)]  # taps, tiles a tap


LIMITS = [1, 16, 17, 32, 33, 64, 65, 127, 128]  # of |rhs|; around those where kernels change


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("num_blocks", range(1, 5))
@pytest.mark.parametrize("num_rows", ROWS)
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


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("num_rows", range(1, MR + 1))
def test_gemm_of_codes_is_exact(isa: str, num_rows: int, bits: int) -> None:
    rng = np.random.default_rng(num_rows * 10 + bits)
    for tiles, accumulate in itertools.product((1, 2, 3, 4, 7, 33), (False, True)):
        codes = rng.integers(0, 2**bits, (16, 4 * tiles), np.uint8)
        table = np.resize(rng.integers(-128, 128, 2**bits, np.int8), 256)
        lhs = rng.integers(0, 256, (num_rows, 4 * tiles), np.uint8)
        before = rng.integers(-1000, 1000, (num_rows, PANEL)).astype(np.int32)
        expected = before.copy()
        sums = lhs.astype(np.int32) @ table[codes].astype(np.int32).T
        expected[:, :16] = sums + accumulate * before[:, :16]
        with output((num_rows, PANEL), np.int32, before) as dst:
            packed = guarded(pack(codes, bits))
            kernels.gemm_s32_u8_afp(
                isa, guarded(lhs), packed, bits, guarded(table), accumulate, dst
            )
            assert_same_bits(dst, expected, (tiles, accumulate))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("num_blocks", range(1, 5))
@pytest.mark.parametrize("num_rows", ROWS)
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
@pytest.mark.parametrize("num_rows", ROWS)
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


@pytest.mark.parametrize("rhs_planes", [1, 2])
@pytest.mark.parametrize("lhs_planes", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
def test_finish_combines_and_stores(isa: str, rows: int, lhs_planes: int, rhs_planes: int) -> None:
    for channels in range(1, PANEL + 1, 3):
        rng = np.random.default_rng(channels)
        sums = rng.integers(-(2**29), 2**29, (rhs_planes, rows * lhs_planes, PANEL), np.int32)
        columns = rng.integers(-(2**21), 2**21, (rhs_planes, channels), np.int32)
        zero_points = rng.integers(0, 256**lhs_planes, rows, np.int32)
        scales, row_scales, bias = floats(rng, channels), floats(rng, rows), floats(rng, channels)
        row_scales[0] = np.nan
        low, high = [(-INF, INF), (0.0, 1e6)][channels % 2]
        products = np.zeros((rows, PANEL), np.float32)
        kernels.combine_f32_s32("scalar", sums, columns, zero_points, scales, False, products)
        args = [guarded(a) for a in (sums, columns, zero_points, scales, row_scales, bias)]
        for strides, shape in (
            ((channels + 3, 1), (rows, channels + 3)),
            ((1, rows + 3), (channels, rows + 3)),
        ):
            expected = np.full(shape, 7, np.float32)
            flat = expected.reshape(-1)
            kernels.store_f32("scalar", products, row_scales, bias, low, high, *strides, flat)
            with output(shape, np.float32, 7) as dst:
                kernels.finish_f32_s32(isa, *args, low, high, *strides, dst.reshape(-1))
                assert_same_bits(dst, expected, channels)


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
