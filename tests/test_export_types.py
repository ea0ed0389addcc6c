"""Which of ONNX's small types holds a tensor, and how near the others come."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from afpq._standard import TYPES, fit
from afpq.formats import AfpFormat, all_formats, decode, encode, round_scale
from afpq.packing import pack

SCALES = np.array([0.1, 3.0, 1e-5], np.float32)


def layer(text, codes, scale=SCALES, kind="real"):
    """What `fit` looks at of a layer with these codes [n, k] and scales [n]."""
    fmt = AfpFormat.parse(text)
    scale = round_scale(fmt, scale, kind)
    return SimpleNamespace(
        format=fmt,
        n=codes.shape[0],
        k=codes.shape[1],
        group_size=0,
        kind="real",
        packed=pack(codes, fmt.bits),
        stored_scale=scale.astype(ml_dtypes.bfloat16),
        values=decode(codes, fmt, scale[:, None]),
    )


def all_codes(text, *left_out):
    """Every code but -0 in three rows; those left out become 0."""
    fmt = AfpFormat.parse(text)
    codes = np.tile(np.arange(1 << fmt.bits, dtype=np.uint8), (3, 1))
    codes[np.isin(codes, [fmt.num_magnitudes, *left_out])] = 0
    return codes


def decoded(fitted):
    return fitted.codes.astype(np.float32) * fitted.scale[:, None]


def same_bits(result, expected):
    # Zeros have one sign only, so bits can be compared.
    assert (result.view(np.uint32) == expected.view(np.uint32)).all()


# By arithmetic: magnitudes of at most 7 and 127; float4 is 0 .5 1 1.5 2 3 4 6; float8e4m3fn has 4 significant bits from
# 2^-9 to 448, float8e5m2 has 3 from 2^-16 to 57344.
HOLDS = {
    "int4": "e0m1 e0m2 e0m3 e1m0 e1m1 e1m2 e2m0",
    "float4e2m1": "e2m1",
    "int8": "e0m4 e0m5 e0m6 e0m7 e1m3 e1m4 e1m5 e1m6 e2m2 e2m3 e2m4 e3m0",
    "float8e4m3fn": "e3m1 e3m2 e3m3 e4m0 e4m1 e4m2",
    "float8e5m2": "e5m0 e5m1",
    "": "e2m5 e3m4 e4m3 e5m2",
}
EXPECTED = {text: kind for kind, texts in HOLDS.items() for text in texts.split()}


@pytest.mark.parametrize("text", [str(fmt) for fmt in all_formats()])
def test_smallest_type_that_holds_a_whole_format_is_taken(text):
    given = layer(text, all_codes(text))

    fitted = fit(given)

    assert (fitted.type.name if fitted else "") == EXPECTED[text]
    if fitted:
        assert fitted.exact and fitted.sqnr_db is None
        same_bits(decoded(fitted), given.values)


@pytest.mark.parametrize(
    ("text", "top", "name"), [("e4m3", 1, "float8e4m3fn"), ("e5m2", 4, "float8e5m2")]
)
def test_codes_that_are_nan_or_infinity_in_onnx_hold_no_weight(text, top, name):
    # float8e4m3fn has NaN where e4m3 has its largest value, float8e5m2 where e5m2 has its four largest.
    fmt = AfpFormat.parse(text)
    largest = np.arange(fmt.num_magnitudes - top, fmt.num_magnitudes)
    usable = layer(text, all_codes(text, *largest, *(largest + fmt.num_magnitudes)))
    fitted = fit(usable)
    assert fitted is not None and fitted.type.name == name
    same_bits(decoded(fitted), usable.values)

    one_more = layer(text, all_codes(text, *largest[1:], *(largest[1:] + fmt.num_magnitudes)))
    assert fit(one_more) is None
    nearest = fit(one_more, nearest=True)
    assert nearest is not None and nearest.type.name == name
    assert np.isfinite(decoded(nearest)).all()
    assert nearest.sqnr_db is not None and nearest.sqnr_db > 100


def test_every_row_may_have_a_power_of_two_of_its_own():
    # Large integers of one row, small ones of the other: both have 3 significant bits.
    text = "e3m2"
    fmt = AfpFormat.parse(text)
    integers = np.array([[448, 64, -384, 0], [7, 1, -6, 2]], np.float32)
    codes = encode(integers, fmt, 1.0)
    given = layer(text, codes, SCALES[:2])

    fitted = fit(given)

    assert fitted is not None and fitted.type.name == "int4"
    assert fitted.codes.astype(int).tolist() == [[7, 1, -6, 0], [7, 1, -6, 2]]
    same_bits(decoded(fitted), given.values)


def test_scales_that_would_overflow_take_another_power_of_two_or_none():
    # All of e4m2 needs I / 256 in float8e4m3fn, and a scale 256 times as large; small I fit as they are.
    huge = np.array([2.0**120], np.float32)
    small = encode(np.array([[192, -1, 3, 96]], np.float32), AfpFormat.parse("e4m2"), 1.0)
    given = layer("e4m2", small, huge)

    fitted = fit(given)

    assert fitted is not None and fitted.type.name == "float8e4m3fn"
    assert np.isfinite(fitted.scale).all()
    same_bits(decoded(fitted), given.values)
    # All of e5m1 fits float8e5m2 alone, as I / 65536.
    every = all_codes("e5m1")[:1]
    assert fit(layer("e5m1", every, np.array([2.0**95], np.float32))) is not None
    with np.errstate(over="ignore"):  # I * scale is infinite there
        assert fit(layer("e5m1", every, np.array([2.0**112], np.float32))) is None


@pytest.mark.parametrize("text", ["e2m5", "e3m4"])
def test_nearest_type_is_the_one_with_the_least_error(text):
    rng = np.random.default_rng(0)
    fmt = AfpFormat.parse(text)
    weights = rng.normal(size=(8, 64)).astype(np.float32)
    scale = round_scale(fmt, np.abs(weights).max(1) / fmt.max_integer, "real")
    given = layer(text, encode(weights, fmt, scale[:, None]), scale)

    fitted = fit(given, nearest=True)

    assert fitted is not None and not fitted.exact
    exact = given.values.astype(np.float64)
    noise = ((decoded(fitted) - exact) ** 2).sum()
    assert fitted.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / noise))
    rivals = [_plain_int8(exact), *(_plain_float(exact, kind) for kind in TYPES[3:])]
    assert noise <= min(((rival - exact) ** 2).sum() for rival in rivals) * (1 + 1e-6)


def _plain_int8(values):
    scale = np.abs(values).max(1, keepdims=True) / 127
    return np.rint(values / scale) * scale


def _plain_float(values, kind):
    largest = float(ml_dtypes.finfo(kind.dtype).max)
    scale = 2.0 ** np.ceil(np.log2(np.abs(values).max(1, keepdims=True) / largest))
    return (values / scale).astype(np.float32).astype(kind.dtype).astype(np.float64) * scale


def test_rows_of_zeros_fit_anywhere():
    fitted = fit(layer("e5m2", np.zeros((3, 5), np.uint8)))
    assert fitted is not None and fitted.type.name == "int4" and fitted.exact
    assert not fitted.codes.astype(int).any() and (fitted.scale > 0).all()


@pytest.mark.parametrize(("text", "name", "num_bytes"), [("e0m3", "int4", 8), ("e2m3", "int8", 15)])
def test_bytes_are_those_of_codes_and_scales(text, name, num_bytes):
    fitted = fit(layer(text, all_codes(text)[:, -5:]))  # 3 rows of 5, negative ones
    assert fitted is not None and fitted.type.name == name
    assert fitted.storage_bytes == num_bytes + 3 * 4
