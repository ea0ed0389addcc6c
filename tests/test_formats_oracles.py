"""The number format against two independent libraries, and what holds for any number."""

import gfloat
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from codes import (
    EXPONENT_BIASES,
    FORMATS,
    SIGNED,
    all_codes,
    any_format,
    exact_nearest,
    midpoints,
    negative_zero,
)
from gfloat.types import Domain
from hypothesis import given
from hypothesis import strategies as st

from afpq.formats import (
    AfpFormat,
    decode,
    encode,
    fake_quantize,
    magnitudes,
    scale_of,
)


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
