"""Every kernel of an instruction set against the scalar one, bit by bit, on random numbers: a second of work.

The tests compare the scalar kernels with their definitions in NumPy; here only the processor is new.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq import _core

__all__ = ["differing_kernels", "kernel_names"]

Array = npt.NDArray[Any]
Case = Callable[[str], list[Array]]  # instruction set -> what its kernel computes

_LOW, _HIGH = -1.5, 2.5
_ROWS, _CHANNELS, _TILES, _COUNT = 5, 37, 7, 83
_KERNELS: Any = _core.kernels


def kernel_names() -> list[str]:
    """The kernels that are compared."""
    return [name for name, _ in _cases()]


def differing_kernels(isa: str) -> list[str]:
    """Names of the kernels of `isa` that do not give the bits of the scalar ones."""
    return [name for name, case in _cases() if not _same(case(isa), case("scalar"))]


def _same(first: list[Array], second: list[Array]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def _cases() -> Iterator[tuple[str, Case]]:
    rng = np.random.default_rng(0)
    yield from _expansions(rng)
    yield from _products(rng)
    yield from _quantizers(rng)
    yield from _ends(rng)
    yield from _planes(rng)


def _floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def _into(
    name: str, dtype: npt.DTypeLike, shape: tuple[int, ...], *args: Any, **more: Any
) -> tuple[str, Case]:
    """A kernel that writes into its last argument, an array of this kind."""

    def run(isa: str) -> list[Array]:
        dst = np.zeros(shape, dtype)
        getattr(_KERNELS, name)(isa, *args, dst, **more)
        return [dst]

    return name, run


def _expansions(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    kinds = {"expand_s8_afp": np.int8, "expand_s16_afp": np.int16, "expand_f32_afp": np.float32}
    for name, dtype in kinds.items():
        for bits in range(2, 9):
            src = rng.integers(0, 256, _TILES * 8 * bits, np.uint8)
            entries = rng.integers(-128, 128, 1 << bits).astype(dtype)
            table = np.tile(entries, 256 >> bits)
            yield _into(name, dtype, (_TILES, 64), src, bits, table)


def _products(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    shape = (2, _ROWS, 4 * _TILES)
    rhs_shape, dst = (3, 2 * _TILES, 64), (_ROWS, 64)
    lhs = rng.integers(0, 256, shape, np.uint8)
    for limit in (15, 31, 63, 127):
        rhs = rng.integers(-limit, limit, rhs_shape, np.int8, endpoint=True)
        yield _into("gemm_s32_u8_s8", np.int32, dst, lhs, rhs, limit, False)
    for bits in (4, 7, 8):
        codes = rng.integers(0, 256, _TILES * 8 * bits, np.uint8)
        table = np.resize(rng.integers(-128, 128, 2**bits, np.int8), 256)
        yield _into("gemm_s32_u8_afp", np.int32, dst, lhs[0], codes, bits, table, False)
    words = rng.integers(-(2**15), 2**15, shape, np.int16)
    weights = rng.integers(-300, 300, rhs_shape, np.int16)
    yield _into("gemm_s32_s16_s16", np.int32, dst, words, weights, False)
    yield _into(
        "gemm_f32_f32_f32", np.float32, dst, _floats(rng, *shape), _floats(rng, *rhs_shape), False
    )
    taps = rng.integers(0, 256, (12, 1, _ROWS, 48), np.uint8)
    for limit in (127, 254, 300):
        by_tap = rng.integers(-limit, limit, (3, 3, 64), np.int16, endpoint=True)
        yield _into("depthwise_s32_u8_s16", np.int32, dst, taps, by_tap)
    columns = rng.integers(-3000, 3000, (1, 16), np.int32)
    of_channels = (_floats(rng, 16), _floats(rng, 16), 0.3, _LOW, _HIGH)
    rows = ([0, 7], 41, 11, 8)  # taps, pixels, pitch and size of a row
    planes = rng.integers(0, 256, (_TILES, 64, 4), np.uint8)
    for limit in (15, 31, 63):
        small = rng.integers(-limit, limit, (1, 2 * _TILES, 64), np.int8, endpoint=True)
        args = (planes, *rows, small, limit, 7, columns, *of_channels)
        yield _into("gemm_pixels_f32_u8_s8", np.float32, (16, 32), *args)
    pairs = rng.integers(-(2**15), 2**15, (2 * _TILES, 64, 2), np.int16)
    args = (pairs, *rows, weights[:1], 0, -9, columns, *of_channels)
    yield _into("gemm_pixels_f32_s16_s16", np.float32, (16, 32), *args)


def _quantizers(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    src, row = _floats(rng, 20, _COUNT), _floats(rng, _COUNT)
    size = _COUNT // 3
    rows = (3, size, size + 2)  # of pixels: how many, how long, from one to the next
    yield "range_f32", lambda isa: [np.array(_KERNELS.range_f32(isa, row))]
    static = {"format": "ue2m5", "scale": np.float32(0.0390625)}
    even = {"format": "e0m7", "scale": np.float32(0.0390625)}
    for how in ({}, static, even):
        yield _into("quantize_u8_f32", np.uint8, (1, _COUNT), row, 30.0, 131, **how)
        yield _into("quantize_transpose_u8_f32", np.uint8, (1, _COUNT, 20), src, 30.0, 131, **how)
        yield _into("quantize_pixels_u8_f32", np.uint8, (5, 96, 4), src, *rows, 30.0, 131, **how)
        yield _into("quantize_s16_f32", np.int16, (_COUNT,), row, 30.0, 131, 256, **how)
        yield _into(
            "quantize_transpose_s16_f32", np.int16, (_COUNT, 20), src, 30.0, 131, 256, **how
        )
        yield _into(
            "quantize_pixels_s16_f32", np.int16, (10, 96, 2), src, *rows, 30.0, 131, 256, **how
        )
    yield _into("transpose_f32", np.float32, (_COUNT, 20), src)


def _ends(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    sums = rng.integers(-(2**20), 2**20, (2, _ROWS, 64), np.int32)
    columns = rng.integers(-3000, 3000, (2, _CHANNELS), np.int32)
    zeros, scales = rng.integers(0, 256, _ROWS, np.int32), np.abs(_floats(rng, _CHANNELS))
    yield _into("combine_f32_s32", np.float32, (_ROWS, 64), sums, columns, zeros, scales, False)
    src, row_scales, bias = _floats(rng, _ROWS, 64), _floats(rng, _ROWS), _floats(rng, _CHANNELS)
    for strides in ((64, 1), (1, _ROWS)):
        args = (src, row_scales, bias, _LOW, _HIGH, *strides)
        yield _into("store_f32", np.float32, (64 * 64,), *args)
        counted = (sums, columns, zeros, scales, *args[1:])
        yield _into("finish_f32_s32", np.float32, (64 * 64,), *counted)
    yield _into("add_clamp_f32", np.float32, src.shape, src, _CHANNELS, _LOW, _HIGH)
    residual = rng.integers(0, 256, (_ROWS, _CHANNELS), np.uint8)
    for text in ("ue1m7", "e2m4"):
        end = (residual, 128, 0.0390625, _LOW, _HIGH, text, np.float32(0.0390625))
        shape = (_ROWS, _CHANNELS)
        yield _into("store_u8_f32", np.uint8, shape, src, row_scales, bias, *end)
        small = scales * np.float32(1e-6)
        yield _into("finish_u8_s32", np.uint8, shape, sums, columns, 7, small, 0.3, bias, *end)


def _planes(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    rows = _floats(rng, 3, 64)
    for step in (1, 2, 3):
        yield _into("pick_f32", np.float32, (3, 21), rows, step, 21)
    src, weights = _floats(rng, 7, 1, 9, 20), _floats(rng, 9, 16)
    taps = np.array([(0, y - 1, x - 1) for y in range(3) for x in range(3)], np.int32)
    for step, size in ((1, 20), (2, 10)):
        rows_out = -(-9 // step)
        of_channels = (_floats(rng, 7), _floats(rng, 7), _LOW, _HIGH)
        args = (src, taps, weights, step, step, *of_channels)
        yield _into("planar_f32", np.float32, (7, rows_out, size), *args, size)
    taps, weights = rng.integers(0, 99, 27, np.uint64), _floats(rng, 3, 28, 16)
    ends = _floats(rng, 37), _floats(rng, 37)
    pixels = rng.integers(0, 20, 8, np.uint64)
    yield _into(
        "planar_rows_f32", np.float32, (8, 64), _floats(rng, 120), taps, pixels, weights, *ends
    )
    lanes = ([0, 16, 96], _floats(rng, 3, 16), 16, 96, _floats(rng, 16), _floats(rng, 16))
    yield _into("depthwise_f32", np.float32, (4, 5, 16), _floats(rng, 480), *lanes, _LOW, _HIGH)
