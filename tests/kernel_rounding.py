"""What kernels round floats to, in NumPy."""

import numpy as np
from kernel_arrays import Array

from afpq.formats import AfpFormat, codebook, encode, round_scale


def quantize(x: Array, inverse_scale: float, zero_point: int, num_planes: int) -> Array:
    """uint8 [num_planes, ...]"""
    rounded = np.rint(x * np.float32(inverse_scale)).astype(np.int64) + zero_point
    q = np.clip(rounded, 0, 255 if num_planes == 1 else 65535)
    return np.stack([q] if num_planes == 1 else [q >> 8, q & 255]).astype(np.uint8)


def words_of(planes: Array) -> Array:
    """What words hold of the bytes that `quantize` gives."""
    if len(planes) == 1:
        return planes[0].astype(np.int16)
    return (planes[0].astype(np.int32) * 256 + planes[1] - 32768).astype(np.int16)


SCALES = round_scale(AfpFormat(0, 1), [2.0**-126, 0.00731, 0.6667, 1.0, 3.1, 2.0**100], "real")


def encoded(x: Array, fmt: AfpFormat, scale: np.float32) -> Array:
    """The bytes of the integers of the definition's codes."""
    integers = codebook(fmt)[encode(x, fmt, scale)]
    return (integers + (128 if fmt.signed else 0)).astype(np.uint8)
