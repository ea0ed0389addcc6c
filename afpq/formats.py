"""The adaptive-float number format: the definition that every other implementation is proven equal to.

A format has 1 sign bit (none if unsigned), `exponent_bits` E and `mantissa_bits` M; it has subnormals and neither
infinity nor NaN. A code, read as (sign, exponent field e, mantissa field m), is the integer

    I = m                     if e == 0        (subnormal)
    I = (2^M + m) << (e - 1)  otherwise

and the value  +-I * 2^(1 - M - exponent_bias) = +-I * scale.  The exponent bias is data, not part of the format:
one number per tensor, channel or group. It is stored either as an `int8` (`integer`: the scale is a power of two) or
as a bfloat16 scale (`real`). Packing of codes into bytes is in `packing`; choosing a scale is in `rounding`.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from afpq.errors import FormatError

__all__ = [
    "AfpFormat",
    "all_formats",
    "codebook",
    "decode",
    "encode",
    "exponent_bias_of",
    "fake_quantize",
    "magnitudes",
    "round_scale",
    "scale_of",
]

MAX_EXPONENT_BITS = 5
MAX_MANTISSA_BITS = 7
MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True, order=True)
class AfpFormat:
    """A small float: `AfpFormat(2, 1)` is e2m1, `AfpFormat(2, 5, signed=False)` is ue2m5.

    `mantissa_bits` counts stored bits, without the hidden one. The width is 2..8 bits, sign included.

    Raises:
        FormatError: a field is out of range.

    Example:
        >>> fmt = afpq.AfpFormat.parse("e2m1")
        >>> fmt.bits, fmt.max_integer, fmt.kernel_class
        (4, 12, 'byte')
    """

    exponent_bits: int
    mantissa_bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.exponent_bits <= MAX_EXPONENT_BITS:
            raise FormatError(
                f"exponent_bits {self.exponent_bits} is not in the range 0..{MAX_EXPONENT_BITS}"
            )
        if not 0 <= self.mantissa_bits <= MAX_MANTISSA_BITS:
            raise FormatError(
                f"mantissa_bits {self.mantissa_bits} is not in the range 0..{MAX_MANTISSA_BITS}"
            )
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise FormatError(
                f"{self} has {self.bits} bits, not in the range {MIN_BITS}..{MAX_BITS}"
            )

    @classmethod
    def parse(cls, text: str) -> "AfpFormat":
        """Reads `e2m1`, `ue2m5` or the long form `afp4_e2m1`.

        Raises:
            FormatError: the text is not a format, or its long form names the wrong width.
        """
        match = re.fullmatch(r"(?:afp(\d)_)?(u?)e(\d)m(\d)", text)
        if match is None:
            raise FormatError(f"{text!r} is not a format; write e2m1, ue2m5 or afp4_e2m1")
        width, unsigned, exponent_bits, mantissa_bits = match.groups()
        result = cls(int(exponent_bits), int(mantissa_bits), signed=not unsigned)
        if width is not None and int(width) != result.bits:
            raise FormatError(f"{text!r} says {width} bits, but {result} has {result.bits}")
        return result

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        """Width of a code, sign included."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def num_magnitudes(self) -> int:
        """Number of codes with a clear sign bit."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def max_integer(self) -> int:
        """The largest `I`; 12 for e2m1."""
        return int(magnitudes(self)[-1])

    @property
    def kernel_class(self) -> str:
        """How kernels execute the format: `byte`, `pair` (two byte planes) or `wide` (float lanes)."""
        if self.max_integer <= 127:
            return "byte"
        return "pair" if self.max_integer <= 32767 else "wide"

    @property
    def fits_activations(self) -> bool:
        """Whether kernels round activations to it: `I`, or `I + 128` if signed, is an unsigned byte.

        It also needs a mantissa: then the even one of two codes is the one with the even mantissa.
        """
        return self.mantissa_bits > 0 and self.max_integer <= (127 if self.signed else 255)

    @property
    def zero_byte(self) -> int:
        """What kernels add to `I` to make it an unsigned byte, and so the byte of 0: 128 if signed, else 0."""
        return 128 if self.signed else 0


@cache
def magnitudes(fmt: AfpFormat) -> npt.NDArray[np.int64]:
    """`I` of every code with a clear sign bit, strictly increasing: int64 [num_magnitudes]."""
    code = np.arange(fmt.num_magnitudes, dtype=np.int64)
    exponent, mantissa = code >> fmt.mantissa_bits, code & ((1 << fmt.mantissa_bits) - 1)
    normal = ((1 << fmt.mantissa_bits) + mantissa) << np.maximum(exponent - 1, 0)
    result = np.where(exponent == 0, mantissa, normal)
    result.flags.writeable = False
    return result


@cache
def codebook(fmt: AfpFormat) -> npt.NDArray[np.int64]:
    """`+-I` of every code in code order: int64 [2^bits]. The code of -0 holds 0."""
    positive = magnitudes(fmt)
    result = np.concatenate([positive, -positive]) if fmt.signed else positive.copy()
    result.flags.writeable = False
    return result


@cache
def all_formats(signed: bool = True) -> tuple[AfpFormat, ...]:
    """Every format of 2..8 bits, in (exponent_bits, mantissa_bits) order."""
    return tuple(
        AfpFormat(e, m, signed)
        for e in range(MAX_EXPONENT_BITS + 1)
        for m in range(MAX_MANTISSA_BITS + 1)
        if MIN_BITS <= int(signed) + e + m <= MAX_BITS
    )


def scale_of(fmt: AfpFormat, exponent_bias: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """float32 `2^(1 - M - exponent_bias)`: what one unit of `I` is worth."""
    power = 1 - fmt.mantissa_bits - np.asarray(exponent_bias, np.float64)
    return np.exp2(power).astype(np.float32)


def exponent_bias_of(fmt: AfpFormat, scale: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The inverse of `scale_of`, exact where the scale is a power of two."""
    return 1 - fmt.mantissa_bits - np.log2(np.asarray(scale, np.float64))


def round_scale(fmt: AfpFormat, scale: npt.ArrayLike, kind: str) -> npt.NDArray[np.float32]:
    """Rounds positive scales to ones that can be stored: float32, same shape.

    `real` keeps 8 significant bits (bfloat16, ties to even); `integer` takes the power of two that is nearest in
    the logarithm, with `exponent_bias` in -128..127.
    """
    scale = np.asarray(scale, np.float32)
    if kind == "real":
        bits = scale.view(np.uint32).astype(np.int64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # The ends are kept: the smallest normal number and the largest finite one.
        kept = np.asarray(np.clip(rounded, 0x0080_0000, 0x7F7F_0000), np.uint32)
        return kept.view(np.float32)
    if kind == "integer":
        lowest = max(-128, -126 - fmt.mantissa_bits)  # 2^127, the largest power of two of a float32
        bias = np.clip(np.rint(exponent_bias_of(fmt, scale)), lowest, 127)
        return scale_of(fmt, bias)
    raise FormatError(f"exponent bias kind {kind!r} is not one of real, integer")


def encode(values: npt.ArrayLike, fmt: AfpFormat, scale: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Rounds values to the nearest code, ties to the even code, saturating: uint8, same shape.

    `scale` broadcasts against `values`. -0 is never produced; unsigned formats send negative values to 0.

    Raises:
        FormatError: a value is not finite, or a scale is not a positive finite number.
    """
    x = np.asarray(values, np.float32)
    s = np.asarray(scale, np.float32)
    if not np.isfinite(x).all():
        raise FormatError("values to encode must be finite, got NaN or infinity")
    if not (np.isfinite(s).all() and (s > 0).all()):
        raise FormatError("scales must be positive finite numbers")
    # A float64 quotient of two float32 numbers is never rounded onto a midpoint that it is not exactly equal to
    # (midpoints have at most 9 significant bits), so comparing the quotient decides ties exactly.
    ratio = np.abs(x).astype(np.float64) / s.astype(np.float64)
    levels = magnitudes(fmt)
    midpoints = (levels[1:] + levels[:-1]) / 2
    code = np.searchsorted(midpoints, ratio, side="left")
    tie = midpoints[np.minimum(code, len(midpoints) - 1)] == ratio
    code = np.where(tie & (code & 1 == 1), code + 1, code)
    if not fmt.signed:
        return np.where(x < 0, 0, code).astype(np.uint8)
    negative = (x < 0) & (code > 0)
    return np.where(negative, code + fmt.num_magnitudes, code).astype(np.uint8)


def decode(
    codes: npt.NDArray[np.uint8], fmt: AfpFormat, scale: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """The values of codes: float32 `I * scale`, one rounding, same shape as `codes`.

    Raises:
        FormatError: a code is not below 2^bits.
    """
    if codes.size and int(codes.max()) >= 1 << fmt.bits:
        raise FormatError(
            f"code {int(codes.max())} is not in the range 0..{(1 << fmt.bits) - 1} of {fmt}"
        )
    integers = codebook(fmt).astype(np.float32)[codes]
    return integers * np.asarray(scale, np.float32)


def fake_quantize(
    values: npt.ArrayLike, fmt: AfpFormat, scale: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """`decode(encode(values))`: the values a format can hold that are nearest to `values`."""
    return decode(encode(values, fmt, scale), fmt, scale)
