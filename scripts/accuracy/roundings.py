"""Published ways to round a weight [n, k]: each gives the rounded weight and the bits that it would be stored in."""

import math
import zlib
from collections.abc import Callable

import numpy as np

from afpq.formats import AfpFormat, magnitudes
from afpq.plan import storage_bits
from afpq.rounding import best_scale, fake_quantize_rows

__all__ = ["ROUNDINGS"]


def int_weights(weight: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    fmt = AfpFormat(0, bits - 1)
    scale, _ = best_scale(weight, fmt)
    return fake_quantize_rows(weight, fmt, scale), storage_bits(
        *weight.shape, fmt, "real", "per_channel"
    )


def maximum_fits(weight: np.ndarray, fmt: AfpFormat) -> np.ndarray:
    largest = float(np.abs(weight).max()) or 1.0
    scale = 2.0 ** math.ceil(math.log2(largest / fmt.max_integer))
    return fake_quantize_rows(weight, fmt, np.array([scale], np.float32))


def paper_weights(weight: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    exponent_bits = min(3, bits - 1)
    return maximum_fits(
        weight, AfpFormat(exponent_bits, bits - 1 - exponent_bits)
    ), bits * weight.size


def paper_weights_per_layer(weight: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    every = [maximum_fits(weight, AfpFormat(e, bits - 1 - e)) for e in range(min(5, bits - 1) + 1)]
    return min(every, key=lambda v: float(np.square(v - weight).sum())), bits * weight.size


def adaptivfloat_weights(weight: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    exponent_bits = min(3, bits - 1)
    mantissa_bits = bits - 1 - exponent_bits
    highest = math.floor(math.log2(float(np.abs(weight).max()) or 1.0))
    exponents = highest - np.arange(2**exponent_bits)
    fractions = 1 + np.arange(2**mantissa_bits) / 2**mantissa_bits
    grid = np.sort((2.0 ** exponents[:, None] * fractions).reshape(-1))
    grid[0] = 0.0  # the smallest number's code stands for zero
    return nearest(weight, grid), bits * weight.size


def mx_weights(weight: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    fmt = AfpFormat(2, bits - 3)
    rows = weight.reshape(len(weight), -1)
    padded = np.pad(rows, [(0, 0), (0, -rows.shape[1] % 32)]).reshape(len(rows), -1, 32)
    largest = np.abs(padded).max(-1, keepdims=True)
    shared = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 2)
    values = nearest(padded / shared, magnitudes(fmt) / 2.0**fmt.mantissa_bits) * shared
    cut = values.reshape(len(rows), -1)[:, : rows.shape[1]]
    return np.float32(cut), bits * weight.size + 8 * largest.size


def gaussian_limit(weight: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """No rounding at all: every row gets the error that Shannon's rate-distortion function leaves at `bits` a weight.

    No code of Gaussian weights, however long, has less squared error (Cover and Thomas, theorem 10.3.2). A method can
    be better only by looking at the data, or where weights are not Gaussian.
    """
    random = np.random.default_rng(zlib.crc32(np.ascontiguousarray(weight)))
    distortion = 2.0 ** (-2 * bits)
    spread = weight.std(1, keepdims=True) * math.sqrt(distortion * (1 - distortion))
    values = (1 - distortion) * weight + spread * random.standard_normal(weight.shape)
    return np.float32(values), bits * weight.size


def nearest(weight: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Nearest of a symmetric grid given by its magnitudes, ties to even, saturating."""
    size = np.abs(weight)
    above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    middle = (grid[above - 1] + grid[above]) / 2
    upper = (size > middle) | ((size == middle) & (above % 2 == 0))
    return np.float32(np.sign(weight) * grid[np.where(upper, above, above - 1)])


ROUNDINGS: dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, int]]] = {
    "int": int_weights,
    "afp-paper": paper_weights,
    "afp-per-layer": paper_weights_per_layer,
    "adaptivfloat": adaptivfloat_weights,
    "mx": mx_weights,
    "gaussian-limit": gaussian_limit,
}
