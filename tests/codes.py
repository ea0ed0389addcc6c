"""All formats, their codes, and rounding by its definition, for tests of the number format."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest

from afpq.formats import (
    AfpFormat,
    all_formats,
    magnitudes,
)

SIGNED = all_formats()
UNSIGNED = all_formats(signed=False)
FORMATS = SIGNED + UNSIGNED
EXPONENT_BIASES = (-9, 0, 1, 7, 20)
REAL_SCALES = (0.7421875, 3.0, 1.0078125, 2.0**-20 * 1.5)  # bfloat16, no powers of two

any_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
signed_format = pytest.mark.parametrize("fmt", SIGNED, ids=str)


def all_codes(fmt: AfpFormat) -> npt.NDArray[np.uint8]:
    return np.arange(1 << fmt.bits, dtype=np.uint8)


def negative_zero(fmt: AfpFormat) -> int:
    """The code that is never written: sign set, magnitude 0 (not a code of unsigned formats)."""
    return fmt.num_magnitudes


def exact_nearest(value: float, fmt: AfpFormat, scale: float) -> int:
    """The definition in rational numbers: the nearest value, of two the one with the even code."""
    if not fmt.signed and value < 0:
        return 0
    ratio = abs(Fraction(value)) / Fraction(scale)
    levels = [int(i) for i in magnitudes(fmt)]
    code = min(range(len(levels)), key=lambda c: (abs(levels[c] - ratio), c & 1))
    return code + fmt.num_magnitudes if value < 0 and code else code


def midpoints(fmt: AfpFormat) -> npt.NDArray[np.float64]:
    levels = magnitudes(fmt).astype(np.float64)
    return (levels[1:] + levels[:-1]) / 2
