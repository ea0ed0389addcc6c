"""Arrays that a kernel must not leave, and float32 arithmetic to compare it with.

Inputs end where an inaccessible page begins, so that reading past an end is a crash. Outputs lie between canaries, one
element off the alignment of vectors.
"""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
INF = float("inf")
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
