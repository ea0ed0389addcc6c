"""The number format against its specification, exact arithmetic and two independent libraries."""

import math
from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from gfloat.types import Domain
from hypothesis import given
from hypothesis import strategies as st

from afpq.errors import FormatError
from afpq.formats import (
    AfpFormat,
    all_formats,
    codebook,
    decode,
    encode,
    exponent_bias_of,
    fake_quantize,
    magnitudes,
    round_scale,
    scale_of,
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


def gfloat_format(fmt: AfpFormat, exponent_bias: int) -> gfloat.FormatInfo:
    return gfloat.FormatInfo(
        str(fmt),
        fmt.bits,
        fmt.mantissa_bits + 1,
        bias=exponent_bias,
        is_signed=fmt.signed,
        domain=Domain.Finite,
        has_nz=fmt.signed,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )


# --- the descriptor ---


def test_all_formats_lists_every_format_of_2_to_8_bits_once() -> None:
    fields = [(e, m) for e in range(6) for m in range(8)]
    assert SIGNED == tuple(AfpFormat(e, m) for e, m in fields if 1 <= e + m <= 7)
    assert UNSIGNED == tuple(AfpFormat(e, m, signed=False) for e, m in fields if 2 <= e + m <= 8)


@any_format
def test_text_round_trips(fmt: AfpFormat) -> None:
    assert AfpFormat.parse(str(fmt)) == fmt
    assert AfpFormat.parse(f"afp{fmt.bits}_{fmt}") == fmt


@pytest.mark.parametrize(
    ("text", "fmt"),
    [
        ("e2m1", AfpFormat(2, 1)),
        ("ue2m5", AfpFormat(2, 5, signed=False)),
        ("afp6_e3m2", AfpFormat(3, 2)),
        ("afp7_ue2m5", AfpFormat(2, 5, signed=False)),
    ],
)
def test_parse_reads_short_and_long_forms(text: str, fmt: AfpFormat) -> None:
    assert AfpFormat.parse(text) == fmt


@pytest.mark.parametrize(
    "text", ["", "int4", "e2", "m1", "E2M1", "e2m1 ", "e-1m2", "e10m1", "e2m1\n"]
)
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(FormatError, match="is not a format; write e2m1"):
        AfpFormat.parse(text)


def test_parse_refuses_a_wrong_width() -> None:
    with pytest.raises(FormatError, match="says 5 bits, but e2m1 has 4"):
        AfpFormat.parse("afp5_e2m1")


@pytest.mark.parametrize(
    ("exponent_bits", "mantissa_bits", "signed", "message"),
    [
        (6, 1, True, "exponent_bits 6 is not in the range 0..5"),
        (-1, 3, True, "exponent_bits -1 is not in the range 0..5"),
        (0, 8, False, "mantissa_bits 8 is not in the range 0..7"),
        (2, -1, True, "mantissa_bits -1 is not in the range 0..7"),
        (0, 0, True, "e0m0 has 1 bits, not in the range 2..8"),
        (5, 3, True, "e5m3 has 9 bits, not in the range 2..8"),
        (0, 1, False, "ue0m1 has 1 bits, not in the range 2..8"),
        (4, 5, False, "ue4m5 has 9 bits, not in the range 2..8"),
    ],
)
def test_fields_out_of_range_are_named(
    exponent_bits: int, mantissa_bits: int, signed: bool, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        AfpFormat(exponent_bits, mantissa_bits, signed)


@pytest.mark.parametrize(
    ("text", "max_integer", "kernel_class"),
    [
        ("e0m7", 127, "byte"),
        ("e2m0", 4, "byte"),
        ("e2m1", 12, "byte"),
        ("e2m2", 28, "byte"),
        ("e2m3", 60, "byte"),
        ("e2m4", 124, "byte"),
        ("e3m0", 64, "byte"),
        ("e2m5", 252, "pair"),
        ("e3m1", 192, "pair"),
        ("e3m2", 448, "pair"),
        ("e3m4", 1984, "pair"),
        ("e4m0", 16384, "pair"),
        ("ue2m6", 508, "pair"),
        ("e4m1", 49152, "wide"),
        ("e5m2", 7 << 30, "wide"),
    ],
)
def test_kernel_class_follows_the_largest_integer(
    text: str, max_integer: int, kernel_class: str
) -> None:
    fmt = AfpFormat.parse(text)
    assert (fmt.max_integer, fmt.kernel_class) == (max_integer, kernel_class)


# --- every code ---


@any_format
def test_every_code_decodes_to_the_formula_of_the_specification(fmt: AfpFormat) -> None:
    for code in range(1 << fmt.bits):
        sign = code >> (fmt.bits - 1) if fmt.signed else 0
        exponent = (code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
        mantissa = code & ((1 << fmt.mantissa_bits) - 1)
        for bias in EXPONENT_BIASES:
            if exponent == 0:
                value = math.ldexp(mantissa, 1 - fmt.mantissa_bits - bias)
            else:  # (-1)^s * 2^(exponent - bias) * 1.m
                value = math.ldexp(1 + mantissa / (1 << fmt.mantissa_bits), exponent - bias)
            got = decode(np.array([code], np.uint8), fmt, scale_of(fmt, bias))[0]
            assert got == (-value if sign else value)


@any_format
def test_magnitudes_increase_strictly(fmt: AfpFormat) -> None:
    assert (np.diff(magnitudes(fmt)) > 0).all()
    assert magnitudes(fmt)[0] == 0


@any_format
@pytest.mark.parametrize("bias", EXPONENT_BIASES)
def test_encoding_a_decoded_code_gives_it_back(fmt: AfpFormat, bias: int) -> None:
    expected = np.where(all_codes(fmt) == negative_zero(fmt), 0, all_codes(fmt))
    scale = scale_of(fmt, bias)
    np.testing.assert_array_equal(encode(decode(all_codes(fmt), fmt, scale), fmt, scale), expected)


@any_format
@pytest.mark.parametrize("scale", REAL_SCALES)
def test_encoding_a_decoded_code_gives_it_back_with_a_real_bias(
    fmt: AfpFormat, scale: float
) -> None:
    expected = np.where(all_codes(fmt) == negative_zero(fmt), 0, all_codes(fmt))
    np.testing.assert_array_equal(encode(decode(all_codes(fmt), fmt, scale), fmt, scale), expected)


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS if f.exponent_bits == 1 and f.mantissa_bits < 7], ids=str
)
def test_one_exponent_bit_is_the_uniform_grid_of_one_more_mantissa_bit(fmt: AfpFormat) -> None:
    uniform = AfpFormat(0, fmt.mantissa_bits + 1, fmt.signed)
    np.testing.assert_array_equal(codebook(fmt), codebook(uniform))


def test_e2m1_is_the_grid_of_the_literature() -> None:
    values = decode(np.arange(8, dtype=np.uint8), AfpFormat(2, 1), scale_of(AfpFormat(2, 1), 1))
    np.testing.assert_array_equal(values, [0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_decode_refuses_codes_beyond_the_width() -> None:
    with pytest.raises(FormatError, match=r"code 16 is not in the range 0\.\.15 of e2m1"):
        decode(np.array([3, 16], np.uint8), AfpFormat(2, 1), 1.0)


# --- rounding ---


@any_format
@pytest.mark.parametrize("bias", EXPONENT_BIASES)
def test_midpoints_go_to_the_even_code(fmt: AfpFormat, bias: int) -> None:
    scale = scale_of(fmt, bias)
    ties = (midpoints(fmt) * np.float64(scale)).astype(np.float32)  # exact: 9 significant bits
    lower = np.arange(len(ties))
    even = lower + (lower & 1)
    np.testing.assert_array_equal(encode(ties, fmt, scale), even)
    if fmt.signed:
        np.testing.assert_array_equal(
            encode(-ties, fmt, scale), np.where(even == 0, 0, even + fmt.num_magnitudes)
        )


@any_format
@pytest.mark.parametrize("bias", EXPONENT_BIASES)
def test_the_neighbours_of_midpoints_go_to_the_nearest_code(fmt: AfpFormat, bias: int) -> None:
    scale = scale_of(fmt, bias)
    ties = (midpoints(fmt) * np.float64(scale)).astype(np.float32)
    lower = np.arange(len(ties))
    np.testing.assert_array_equal(encode(np.nextafter(ties, np.float32(0)), fmt, scale), lower)
    above = np.nextafter(ties, np.float32(np.inf))
    np.testing.assert_array_equal(encode(above, fmt, scale), lower + 1)


@any_format
@pytest.mark.parametrize("scale", REAL_SCALES)
def test_a_real_bias_rounds_like_rational_numbers(fmt: AfpFormat, scale: float) -> None:
    near = (midpoints(fmt) * scale).astype(np.float32)[-40:]
    values = np.concatenate(
        [near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(9e9))]
    )
    values = np.concatenate([values, -values[::3]])
    expected = [exact_nearest(float(v), fmt, scale) for v in values]
    np.testing.assert_array_equal(encode(values, fmt, scale), expected)


@any_format
def test_values_beyond_the_largest_saturate(fmt: AfpFormat) -> None:
    top = fmt.num_magnitudes - 1
    largest = np.float32(fmt.max_integer)
    beyond = np.array([np.nextafter(largest, np.float32(np.inf)), largest * 2, 3.4e38], np.float32)
    np.testing.assert_array_equal(encode(beyond, fmt, 1.0), [top] * 3)
    below = [top + fmt.num_magnitudes] * 3 if fmt.signed else [0] * 3
    np.testing.assert_array_equal(encode(-beyond, fmt, 1.0), below)


@any_format
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, -0.25, -0.5])
def test_negative_zero_is_never_written(fmt: AfpFormat, value: float) -> None:
    assert encode([value], fmt, 1.0)[0] == 0
    assert not np.signbit(fake_quantize([value], fmt, 1.0)[0])


@pytest.mark.parametrize("fmt", UNSIGNED, ids=str)
def test_unsigned_formats_send_negative_values_to_zero(fmt: AfpFormat) -> None:
    assert (encode([-1e-30, -0.5, -1.0, -1e30], fmt, 1.0) == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_errors(value: float) -> None:
    with pytest.raises(FormatError, match="values to encode must be finite"):
        encode([0.0, value], AfpFormat(2, 1), 1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_not_positive_are_errors(scale: float) -> None:
    with pytest.raises(FormatError, match="scales must be positive finite numbers"):
        encode([1.0], AfpFormat(2, 1), [scale])


def test_scales_broadcast_by_row() -> None:
    values = np.array([[1, 2, 3], [1, 2, 3]], np.float32)
    scales = np.array([[1.0], [0.5]], np.float32)
    np.testing.assert_array_equal(encode(values, AfpFormat(0, 2), scales), [[1, 2, 3], [2, 3, 3]])


def test_empty_arrays_stay_empty() -> None:
    codes = encode(np.zeros((0, 3), np.float32), AfpFormat(2, 1), 1.0)
    assert codes.shape == (0, 3)
    assert decode(codes, AfpFormat(2, 1), 1.0).shape == (0, 3)


# --- scales ---


@any_format
def test_scale_and_exponent_bias_are_inverse(fmt: AfpFormat) -> None:
    biases = np.arange(-100, 101)
    scales = scale_of(fmt, biases)
    assert scales.dtype == np.float32
    np.testing.assert_array_equal(exponent_bias_of(fmt, scales), biases)


@pytest.mark.parametrize("exponent", [-125, -100, -1, 0, 1, 100])
def test_a_real_scale_rounds_to_bfloat16(exponent: int) -> None:
    rng = np.random.default_rng(exponent + 200)
    scales = np.exp2(exponent + rng.random(1000)).astype(np.float32)
    expected = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(round_scale(AfpFormat(2, 1), scales, "real"), expected)


def test_an_integer_scale_is_the_nearest_power_of_two_in_the_logarithm() -> None:
    fmt = AfpFormat(2, 3)
    got = round_scale(fmt, [1.0, 1.41, 1.42, 3.0, 0.7, 1e-38], "integer")
    np.testing.assert_array_equal(got, [1, 1, 2, 4, 0.5, 2.0**-126])


def test_an_integer_exponent_bias_fits_a_byte() -> None:
    fmt = AfpFormat(0, 2)
    scales = np.array([1e-45, 1e-38], np.float32)
    assert (exponent_bias_of(fmt, round_scale(fmt, scales, "integer")) <= 127).all()


@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("scale", [1e-45, 3.4028235e38])
@any_format
def test_the_extreme_scales_stay_usable(fmt: AfpFormat, scale: float, kind: str) -> None:
    stored = round_scale(fmt, np.float32(scale), kind)
    assert np.isfinite(stored)
    assert stored > 0
    bias = exponent_bias_of(fmt, stored)
    assert kind == "real" or -128 <= bias == np.rint(bias) <= 127


def test_an_unknown_kind_of_bias_is_an_error() -> None:
    with pytest.raises(FormatError, match="exponent bias kind 'float' is not one of real, integer"):
        round_scale(AfpFormat(2, 1), [1.0], "float")


# --- independent libraries ---


@any_format
@pytest.mark.parametrize("bias", EXPONENT_BIASES)
def test_every_code_decodes_as_in_gfloat(fmt: AfpFormat, bias: int) -> None:
    expected = gfloat.decode_ndarray(gfloat_format(fmt, bias), all_codes(fmt).astype(np.int64))
    got = decode(all_codes(fmt), fmt, scale_of(fmt, bias))
    np.testing.assert_array_equal(got, expected)


@any_format
@pytest.mark.parametrize("bias", EXPONENT_BIASES)
def test_values_round_as_in_gfloat(fmt: AfpFormat, bias: int) -> None:
    info = gfloat_format(fmt, bias)
    scale = scale_of(fmt, bias)
    values = dense_values(fmt) * scale
    if not fmt.signed:
        values = np.abs(values)
    expected = gfloat.round_ndarray(
        info, values.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True
    )
    got = fake_quantize(values, fmt, scale)
    np.testing.assert_array_equal(got, expected)
    codes = gfloat.encode_ndarray(info, np.where(expected == 0, 0.0, expected))
    np.testing.assert_array_equal(encode(values, fmt, scale), codes)


@pytest.mark.parametrize(
    ("text", "bias", "dtype"),
    [
        ("e2m1", 1, ml_dtypes.float4_e2m1fn),
        ("e2m3", 1, ml_dtypes.float6_e2m3fn),
        ("e3m2", 3, ml_dtypes.float6_e3m2fn),
    ],
)
def test_formats_without_specials_equal_ml_dtypes(text: str, bias: int, dtype: type) -> None:
    fmt = AfpFormat.parse(text)
    scale = scale_of(fmt, bias)
    decoded = all_codes(fmt).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(decode(all_codes(fmt), fmt, scale), decoded)
    values = dense_values(fmt) * scale
    theirs = values.astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(
        encode(values, fmt, scale), np.where(theirs == negative_zero(fmt), 0, theirs)
    )


@pytest.mark.parametrize(
    ("text", "bias", "dtype"),
    [
        ("e3m4", 3, ml_dtypes.float8_e3m4),
        ("e4m3", 7, ml_dtypes.float8_e4m3),
        ("e4m3", 7, ml_dtypes.float8_e4m3fn),
        ("e4m3", 8, ml_dtypes.float8_e4m3fnuz),
        ("e4m3", 11, ml_dtypes.float8_e4m3b11fnuz),
        ("e5m2", 15, ml_dtypes.float8_e5m2),
        ("e5m2", 16, ml_dtypes.float8_e5m2fnuz),
    ],
)
def test_finite_values_of_eight_bit_floats_equal_ml_dtypes(
    text: str, bias: int, dtype: type
) -> None:
    fmt = AfpFormat.parse(text)
    scale = scale_of(fmt, bias)
    decoded = all_codes(fmt).view(dtype).astype(np.float32)
    finite = np.isfinite(decoded)
    np.testing.assert_array_equal(decode(all_codes(fmt), fmt, scale)[finite], decoded[finite])
    values = dense_values(fmt) * scale
    values = values[np.abs(values) <= float(ml_dtypes.finfo(dtype).max)]
    theirs = values.astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(
        encode(values, fmt, scale), np.where(theirs == negative_zero(fmt), 0, theirs)
    )


def test_no_exponent_bits_is_rounding_to_integers() -> None:
    values = np.linspace(-9, 9, 1441, dtype=np.float32)
    expected = np.clip(np.rint(values), -7, 7)
    np.testing.assert_array_equal(fake_quantize(values, AfpFormat(0, 3), 1.0), expected)


def dense_values(fmt: AfpFormat) -> npt.NDArray[np.float32]:
    """Levels, midpoints and quarter points with neighbours, saturating and random values, as I."""
    levels = magnitudes(fmt).astype(np.float32)
    middle = midpoints(fmt).astype(np.float32)
    points = np.concatenate(
        [levels, middle, (levels[1:] + middle) / 2, levels[-1:] * np.float32(1.7)]
    )
    zero, infinity = np.float32(0), np.float32(np.inf)
    around = np.concatenate(
        [points, np.nextafter(points, infinity), np.nextafter(points[1:], zero)]
    )
    # The smallest float32 numbers cannot be scaled exactly.
    around = around[(around == 0) | (around > 1e-30)]
    random = np.random.default_rng(fmt.bits).random(200, np.float32) * levels[-1] * np.float32(1.2)
    values = np.concatenate([around, random])
    return np.concatenate([values, -values])


# --- properties ---

formats = st.sampled_from(FORMATS)
reals = st.floats(-1e6, 1e6, width=32)
scales = st.builds(
    lambda mantissa, exponent: float(np.float32(mantissa / 128 * 2.0**exponent)),
    st.integers(128, 255),
    st.integers(-20, 12),
)


@given(formats, reals, scales)
def test_the_chosen_value_is_nearest_and_ties_are_even(
    fmt: AfpFormat, value: float, scale: float
) -> None:
    assert int(encode([value], fmt, scale)[0]) == exact_nearest(value, fmt, scale)


@given(formats, reals, scales)
def test_fake_quantize_is_idempotent(fmt: AfpFormat, value: float, scale: float) -> None:
    once = fake_quantize([value], fmt, scale)
    np.testing.assert_array_equal(fake_quantize(once, fmt, scale), once)


@given(formats, reals, scales)
def test_results_stay_in_the_range_of_the_format(
    fmt: AfpFormat, value: float, scale: float
) -> None:
    limit = np.float32(fmt.max_integer) * np.float32(scale)
    got = fake_quantize([value], fmt, scale)[0]
    assert (-limit if fmt.signed else 0) <= got <= limit


@given(st.sampled_from(SIGNED), reals, scales)
def test_the_sign_only_changes_the_sign(fmt: AfpFormat, value: float, scale: float) -> None:
    assert fake_quantize([value], fmt, scale)[0] == -fake_quantize([-value], fmt, scale)[0]


@given(formats, reals, reals, scales)
def test_rounding_keeps_the_order(fmt: AfpFormat, a: float, b: float, scale: float) -> None:
    low, high = fake_quantize([min(a, b), max(a, b)], fmt, scale)
    assert low <= high


@given(
    formats,
    st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3),
    st.integers(-8, 8),
)
def test_scaling_by_a_power_of_two_equals_shifting_the_bias(
    fmt: AfpFormat, value: float, shift: int
) -> None:
    plain = fake_quantize([value], fmt, scale_of(fmt, 3))[0]
    scaled = fake_quantize([value * 2.0**shift], fmt, scale_of(fmt, 3 - shift))[0]
    assert scaled == plain * 2.0**shift
