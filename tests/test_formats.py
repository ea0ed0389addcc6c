"""The number format against its specification and exact arithmetic."""

import math

import ml_dtypes
import numpy as np
import pytest
from codes import (
    EXPONENT_BIASES,
    FORMATS,
    REAL_SCALES,
    SIGNED,
    UNSIGNED,
    all_codes,
    any_format,
    exact_nearest,
    midpoints,
    negative_zero,
)

from afpq.errors import FormatError
from afpq.formats import (
    AfpFormat,
    codebook,
    decode,
    encode,
    exponent_bias_of,
    fake_quantize,
    magnitudes,
    round_scale,
    scale_of,
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
