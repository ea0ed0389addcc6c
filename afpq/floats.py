"""Small floats of training: any split of bits, with the codes that designers reserve, and two ways to round.

`formats` holds the formats of packed weights, which have at most 8 bits and no special codes; here is what training
in 8 and 16 bits needs besides: infinities or codes that are not numbers, floats without subnormals, overflow that does
not saturate. A format is the list of its values; tensors keep float32 and hold only such values. The functions of this
module are the definition, in NumPy; `csrc/train` computes the same bits, faster.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from afpq.errors import FormatError

__all__ = [
    "FloatFormat",
    "element_words",
    "float_magnitudes",
    "kernel_numbers",
    "multiply_rounded",
    "random_words",
    "round_to",
]

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

_MAX_EXPONENT_BITS = 8
_MAX_MANTISSA_BITS = (
    10  # sums of two such numbers round the same way with and without a float32 between
)
_RESOLUTION = 31  # bits of the probabilities of stochastic rounding


@dataclass(frozen=True)
class FloatFormat:
    """A small float with a sign: value (-1)^s * 2^(e - exponent_bias) * 1.m, for e = 0 the subnormal 2^(1 -
    exponent_bias) * 0.m.

    `exponent_bias` is by default that of IEEE 754, 2^(exponent_bits - 1) - 1. The greatest `reserved_codes` codes of
    each sign are no numbers: 2^mantissa_bits in IEEE formats, 1 where only infinity or NaN has a code, 0 where every
    code is a number. Without `subnormals`, e = 0 holds normal numbers too, and its code m = 0 is zero. Numbers beyond
    the greatest become it, or, without `saturate`, infinity.

    Raises:
        FormatError: a field is out of range, or float32 does not hold the values.

    Example:
        >>> fp8 = afpq.floats.FloatFormat(4, 3, exponent_bias=11)
        >>> fp8.bits, fp8.max, fp8.smallest
        (8, 30.0, 0.0001220703125)
    """

    exponent_bits: int
    mantissa_bits: int
    exponent_bias: int | None = None
    reserved_codes: int = 0
    subnormals: bool = True
    saturate: bool = True

    def __post_init__(self) -> None:
        for name, most in [
            ("exponent_bits", _MAX_EXPONENT_BITS),
            ("mantissa_bits", _MAX_MANTISSA_BITS),
        ]:
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise FormatError(f"{name} {value} is not in the range 0..{most}")
        if self.exponent_bits + self.mantissa_bits < 1:
            raise FormatError("a format needs an exponent or a mantissa")
        if self.exponent_bits == 0 and not self.subnormals:
            raise FormatError("a format without exponent bits has only subnormals")
        last = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        if not 0 <= self.reserved_codes < last:
            raise FormatError(
                f"reserved_codes {self.reserved_codes} is not in the range 0..{last - 1}"
            )
        if self.exponent_bias is None:
            bias = (1 << (self.exponent_bits - 1)) - 1 if self.exponent_bits else 0
            object.__setattr__(self, "exponent_bias", bias)
        top = max(1, (last - self.reserved_codes) >> self.mantissa_bits) - self.bias
        lowest = (1 if self.subnormals else 0) - self.bias - self.mantissa_bits
        if top > 127 or lowest < -149:
            raise FormatError(
                f"values of {self} reach from 2^{lowest} to 2^{top + 1}, beyond float32"
            )

    def __str__(self) -> str:
        return f"1-{self.exponent_bits}-{self.mantissa_bits} (bias {self.bias})"

    @property
    def bias(self) -> int:
        """The exponent bias as a number, never None."""
        assert self.exponent_bias is not None
        return self.exponent_bias

    @property
    def bits(self) -> int:
        """Width of a code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max(self) -> float:
        """The greatest number."""
        return float(float_magnitudes(self)[-2])

    @property
    def smallest(self) -> float:
        """The smallest number above zero."""
        return float(float_magnitudes(self)[1])


@cache
def float_magnitudes(fmt: FloatFormat) -> npt.NDArray[np.float64]:
    """The numbers of a format from 0 up, in the order of their codes, and the one that would follow, beyond them."""
    code = np.arange((1 << (fmt.bits - 1)) - fmt.reserved_codes + 1, dtype=np.int64)
    exponent, mantissa = code >> fmt.mantissa_bits, code & ((1 << fmt.mantissa_bits) - 1)
    fraction = mantissa / (1 << fmt.mantissa_bits)
    if fmt.exponent_bits == 0:
        result = np.ldexp(code / (1 << fmt.mantissa_bits), 1 - fmt.bias)
    elif fmt.subnormals:
        below = np.ldexp(fraction, 1 - fmt.bias)
        result = np.where(exponent == 0, below, np.ldexp(1 + fraction, exponent - fmt.bias))
    else:
        result = np.where(code == 0, 0.0, np.ldexp(1 + fraction, exponent - fmt.bias))
    result.flags.writeable = False
    return result


def round_to(x: Floats, fmt: FloatFormat, words: Words | None = None) -> Floats:
    """`x` rounded to numbers of a format: to nearest, ties to the even code, or with `words` stochastically.

    Stochastic: of the two neighbours low and high of |x|, the word w < 2^32 picks high if floor(w / 2) + t >= 2^31
    with t = floor(2^31 * (|x| - low) / (high - low)), so the mean is x to 2^-31 of their distance (Wang et al. 2018).
    NaN stays; the sign of zero too.
    """
    x = np.asarray(x, np.float32)
    values = float_magnitudes(fmt)
    size = np.abs(x).astype(np.float64)
    high = np.minimum(np.searchsorted(values, size, side="left"), len(values) - 1)
    low = np.maximum(high - 1, 0)
    step = np.where(high > low, values[high] - values[low], 1.0)
    fraction = np.clip((size - values[low]) / step, 0.0, 1.0)
    if words is None:
        up = (fraction > 0.5) | ((fraction == 0.5) & (high % 2 == 0))
    else:
        if not fmt.subnormals:  # kernels divide floats here
            between = size < values[1]
            quotient = np.abs(np.where(between, x, 0)) / np.float32(values[1])
            fraction = np.where(between, quotient, fraction)
        part = np.floor(np.ldexp(np.nan_to_num(fraction), _RESOLUTION)).astype(np.int64)
        up = (words >> np.uint32(1)).astype(np.int64) + part >= 1 << _RESOLUTION
    result = np.where(up, values[high], values[low])
    beyond = values[-2] if fmt.saturate else np.inf
    result = np.where(result > values[-2], beyond, result)
    return np.where(np.isnan(x), x, np.copysign(result, x)).astype(np.float32)


def random_words(seed: int, counters: npt.NDArray[np.uint64], *high: int) -> Words:
    """Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): uint32 [4, *counters.shape].

    A counter has the 64 bits of `counters` and up to two words `high` above them; the key is `seed`, below 2^64.
    """
    above = [*high, 0, 0][:2]
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c = [counters & low, counters >> shift, *(np.full_like(counters, h) for h in above)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        first = c[0] * np.uint64(0xD2511F53)
        third = c[2] * np.uint64(0xCD9E8D57)
        c = [
            (third >> shift) ^ c[1] ^ np.uint64(key[0]),
            third & low,
            (first >> shift) ^ c[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c).astype(np.uint32)


def element_words(seed: int, size: int) -> Words:
    """The words by which a tensor is rounded: element 64 b + 16 w + l has word w of counter 16 b + l."""
    blocks = -(-size // 64)
    words = random_words(seed, np.arange(16 * blocks, dtype=np.uint64))
    ordered: Words = words.reshape(4, blocks, 16).swapaxes(0, 1).reshape(-1)
    return ordered[:size]


def multiply_rounded(
    lhs: Floats, rhs: Floats, fmt: FloatFormat, chunk: int, seed: int | None = None
) -> Floats:
    """lhs [m, k] * rhs [k, n] with sums in `fmt`, chunk by chunk (Wang et al. 2018).

    s = 0 at the start of every `chunk` products; s = round(s + product) in the order of k; at its end total =
    round(total + s). Products and sums are float32 before they are rounded. With a `seed`, sums are rounded
    stochastically: the sum over k of element e = row * n + column by word k % 4 of counter (e, k // 4, 1), and that of
    chunk j by word j % 4 of counter (e, j // 4, 2).
    """
    m, k = lhs.shape
    n = rhs.shape[1]
    elements = np.arange(m * n, dtype=np.uint64).reshape(m, n)

    def rounded(x: Floats, index: int, domain: int) -> Floats:
        if seed is None:
            return round_to(x, fmt)
        return round_to(x, fmt, random_words(seed, elements, index // 4, domain)[index % 4])

    total = np.zeros((m, n), np.float32)
    for j, begin in enumerate(range(0, k, chunk)):
        s = np.zeros((m, n), np.float32)
        for i in range(begin, min(begin + chunk, k)):
            s = rounded(s + lhs[:, i, None] * rhs[i], i, 1)
        total = rounded(total + s, j, 2)
    return total


def kernel_numbers(fmt: FloatFormat) -> tuple[float, float, float, float, int, int]:
    """A format as csrc/train/kernels.h has it: low_limit, max, overflow, step; dropped bits and tie flip."""
    values = float_magnitudes(fmt)
    if fmt.exponent_bits == 0:
        limit = np.inf
    elif fmt.subnormals:
        limit = float(np.ldexp(1.0, 1 - fmt.bias))
    else:
        limit = float(values[1])
    # Without a mantissa the code is the exponent: its parity is that of float32's exponent, or the other one.
    flip = (127 - fmt.bias) & 1 if fmt.mantissa_bits == 0 else 0
    overflow = fmt.max if fmt.saturate else np.inf
    return limit, fmt.max, overflow, float(values[1]), 23 - fmt.mantissa_bits, flip
