"""Small floats of training: the definition against ml_dtypes and known vectors, the kernels against the definition."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afpq import _core
from afpq.errors import FormatError
from afpq.floats import (
    FloatFormat,
    element_words,
    float_magnitudes,
    kernel_numbers,
    multiply_rounded,
    random_words,
    round_to,
)
from afpq.formats import AfpFormat, all_formats, fake_quantize, magnitudes

ISAS = _core.kernels.isa_names()
E5M2 = FloatFormat(5, 2, reserved_codes=4, saturate=False)
DLFLOAT = FloatFormat(6, 9, reserved_codes=1, subnormals=False)
FORMATS = [
    FloatFormat(5, 2),
    E5M2,
    FloatFormat(4, 3, exponent_bias=11),
    FloatFormat(4, 3, reserved_codes=1, saturate=False),
    FloatFormat(4, 3, exponent_bias=11, subnormals=False),
    FloatFormat(6, 9),
    DLFLOAT,
    FloatFormat(5, 10, reserved_codes=1024, saturate=False),
    FloatFormat(8, 7, reserved_codes=128, saturate=False),
    FloatFormat(3, 0),
    FloatFormat(4, 0, exponent_bias=2, subnormals=False),
    FloatFormat(0, 7),
    FloatFormat(1, 3),
]
# ml_dtypes' name of each format, and what it has where overflow is infinity here
FOREIGN = [
    ("float8_e5m2", E5M2),
    ("float8_e4m3fn", FloatFormat(4, 3, reserved_codes=1, saturate=False)),
    ("float8_e4m3b11fnuz", FloatFormat(4, 3, exponent_bias=11, saturate=False)),
    ("float8_e4m3fnuz", FloatFormat(4, 3, exponent_bias=8, saturate=False)),
    ("float8_e5m2fnuz", FloatFormat(5, 2, exponent_bias=16, saturate=False)),
    ("float8_e3m4", FloatFormat(3, 4, reserved_codes=16, saturate=False)),
    ("float8_e4m3", FloatFormat(4, 3, reserved_codes=8, saturate=False)),
    ("bfloat16", FloatFormat(8, 7, reserved_codes=128, saturate=False)),
    ("float16", FloatFormat(5, 10, reserved_codes=1024, saturate=False)),
]


def dense(fmt: FloatFormat) -> np.ndarray:
    """Every value and midpoint of a format, their neighbours in float32, and numbers far outside: both signs."""
    values = float_magnitudes(fmt)
    middles = (values[1:] + values[:-1]) / 2
    with np.errstate(over="ignore"):
        exact = np.concatenate([values, middles]).astype(np.float32)
    edges = np.array([0, 1e-45, 1e-38, 1e-20, 1, 1e20, 3.4e38, np.inf, np.nan], np.float32)
    exact = np.concatenate([exact, edges])
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        near = [np.nextafter(exact, np.float32(t), dtype=np.float32) for t in (0, np.inf)]
    x = np.concatenate([exact, *near])
    return np.concatenate([x, -x])


def kernel_round(isa: str, x: np.ndarray, fmt: FloatFormat, seed: int | None, threads: int = 1):
    result = np.empty_like(x)
    _core.round_values(isa, threads, kernel_numbers(fmt), seed, x, result)
    return result


def bits(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


@pytest.mark.parametrize(
    ("fmt", "numbers"),
    [
        (FloatFormat(4, 3, exponent_bias=11), (8, 30.0, 2.0**-13)),
        (FloatFormat(4, 3, exponent_bias=11, subnormals=False), (8, 30.0, 2.0**-11 * 1.125)),
        (FloatFormat(4, 3, reserved_codes=1), (8, 448.0, 2.0**-9)),
        (E5M2, (8, 57344.0, 2.0**-16)),
        (FloatFormat(5, 2), (8, 114688.0, 2.0**-16)),
        (DLFLOAT, (16, 2.0**32 * (2 - 2**-8), 2.0**-31 * (1 + 2**-9))),
        (FloatFormat(2, 1, exponent_bias=1), (4, 6.0, 0.5)),
        (FloatFormat(0, 7), (8, 127 / 64, 1 / 64)),
    ],
)
def test_formats_have_the_numbers_of_their_designers(fmt: FloatFormat, numbers: tuple) -> None:
    assert (fmt.bits, fmt.max, fmt.smallest) == numbers


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_values_increase_and_stay_as_they_are(fmt: FloatFormat) -> None:
    values = float_magnitudes(fmt)
    assert (np.diff(values) > 0).all()
    numbers = values[:-1].astype(np.float32)
    assert np.array_equal(numbers.astype(np.float64), values[:-1])
    assert np.array_equal(round_to(numbers, fmt), numbers)
    words = np.full(len(numbers), 2**32 - 1, np.uint32)
    assert np.array_equal(round_to(numbers, fmt, words), numbers)


@pytest.mark.parametrize(("name", "fmt"), FOREIGN)
def test_nearest_is_what_ml_dtypes_does(name: str, fmt: FloatFormat) -> None:
    x = dense(fmt)
    kind = np.dtype(name) if name == "float16" else np.dtype(getattr(ml_dtypes, name))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(kind).astype(np.float32)
    found = round_to(x, fmt)
    lost = ~np.isfinite(expected)
    assert np.array_equal(lost, ~np.isfinite(found))
    assert np.array_equal(found[~lost], expected[~lost])


@pytest.mark.parametrize("fmt", [f for f in all_formats() if f.signed], ids=str)
def test_formats_of_weights_are_such_floats(fmt: AfpFormat) -> None:
    same = FloatFormat(fmt.exponent_bits, fmt.mantissa_bits, exponent_bias=1 - fmt.mantissa_bits)
    assert np.array_equal(float_magnitudes(same)[:-1], magnitudes(fmt))
    x = dense(same)
    x = x[np.isfinite(x)]
    assert np.array_equal(round_to(x, same), fake_quantize(x, fmt, np.float32(1)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_kernels_round_to_nearest_as_defined(fmt: FloatFormat, isa: str) -> None:
    x = dense(fmt)
    assert np.array_equal(bits(kernel_round(isa, x, fmt, None)), bits(round_to(x, fmt)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_kernels_round_stochastically_as_defined(fmt: FloatFormat, isa: str, seed: int) -> None:
    x = dense(fmt)
    expected = round_to(x, fmt, element_words(seed, x.size))
    assert np.array_equal(bits(kernel_round(isa, x, fmt, seed)), bits(expected))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200_003])
def test_threads_and_sizes_do_not_change_the_bits(isa: str, size: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    expected = round_to(x, E5M2, element_words(7, size))
    for threads in (1, 3):
        assert np.array_equal(kernel_round(isa, x, E5M2, 7, threads), expected)


def test_tensors_are_rounded_in_place() -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = round_to(x, E5M2)
    _core.round_values(ISAS[0], 1, kernel_numbers(E5M2), None, x, x)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that Random123 comes with, for 7 rounds
        ((0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_random_words_are_those_of_philox(counter: tuple, key: tuple, expected: str) -> None:
    low = np.array([counter[0] | counter[1] << 32], np.uint64)
    words = random_words(key[0] | key[1] << 32, low, *counter[2:])
    assert " ".join(f"{w:08x}" for w in words[:, 0]) == expected


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_stochastic_rounding_has_no_bias(fmt: FloatFormat) -> None:
    values = float_magnitudes(fmt)
    for low, high in [(values[0], values[1]), (values[3], values[4]), (values[-3], values[-2])]:
        for share in (0.1, 0.5, 0.75):
            x = np.float32(low + share * (high - low))
            found = kernel_round(ISAS[0], np.full(1 << 16, x), fmt, 3).astype(np.float64)
            assert set(np.unique(found)) == {low, high}
            up = (float(x) - low) / (high - low)
            spread = np.sqrt(up * (1 - up) / (1 << 16))
            assert abs((found.mean() - low) / (high - low) - up) < 4.5 * spread


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    st.sampled_from(FORMATS),
)
def test_nearest_has_no_closer_value(numbers: list[float], fmt: FloatFormat) -> None:
    x = np.array(numbers, np.float32)
    found = round_to(x, fmt).astype(np.float64)
    values = float_magnitudes(fmt)[:-1]
    inside = np.abs(x.astype(np.float64)) <= fmt.max
    distance = np.abs(np.abs(x.astype(np.float64))[:, None] - values).min(1)
    assert np.array_equal(np.abs(found - x)[inside], distance[inside])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("chunk", [1, 5, 64, 1000])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 17, 130), (4, 16, 64), (3, 9, 0)])
def test_products_are_summed_as_defined(
    isa: str, seed: int | None, chunk: int, m: int, n: int, k: int
) -> None:
    rng = np.random.default_rng(k)
    lhs = round_to(rng.standard_normal((m, k)).astype(np.float32), FloatFormat(5, 2))
    rhs = round_to(rng.standard_normal((k, n)).astype(np.float32), FloatFormat(5, 2))
    found = np.full((m, n), np.nan, np.float32)
    _core.multiply_rounded(isa, 2, kernel_numbers(DLFLOAT), seed, chunk, lhs, rhs, found)
    assert np.array_equal(found, multiply_rounded(lhs, rhs, DLFLOAT, chunk, seed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [2.0**-17, 2.0**14, 2.0**16])
def test_sums_below_and_beyond_the_normal_numbers_are_exact_too(isa: str, scale: float) -> None:
    rng = np.random.default_rng(1)
    lhs = (scale * rng.standard_normal((6, 200))).astype(np.float32)
    rhs = (scale * rng.standard_normal((200, 20))).astype(np.float32)
    for fmt in (DLFLOAT, E5M2, FloatFormat(4, 0)):
        found = np.empty((6, 20), np.float32)
        _core.multiply_rounded(isa, 1, kernel_numbers(fmt), None, 16, lhs, rhs, found)
        with np.errstate(invalid="ignore", over="ignore"):
            expected = multiply_rounded(lhs, rhs, fmt, 16)
        assert np.array_equal(bits(found), bits(expected))


def swamping(size: int, chunk: int, seed: int | None = None) -> float:
    """The sum of uniform numbers of mean 1 and deviation 1 in 1-6-9, relative to the exact one: mean of 32 sums."""
    x = np.random.default_rng(0).uniform(1 - 3**0.5, 1 + 3**0.5, (size, 32)).astype(np.float32)
    found = np.empty((1, 32), np.float32)
    ones = np.ones((1, size), np.float32)
    x = round_to(x, DLFLOAT)
    _core.multiply_rounded(ISAS[0], 2, kernel_numbers(DLFLOAT), seed, chunk, ones, x, found)
    return float(np.mean(found[0] / x.astype(np.float64).sum(0)))


# From 2048 to 4096 numbers of 1-6-9 are 4 apart, so an addend counts 4 if it is above 2, else nothing: 4 * P(x > 2) =
# 0.845 of its mean. From 4096 on they are 8 apart, and no addend is above 4.
@pytest.mark.parametrize(
    ("size", "chunk", "ratio"),
    [
        *[(4096, 1, 0.5 + 0.5 * 0.845), (16384, 1, 0.25), (65536, 1, 0.0625)],
        *[(4096, 64, 1.0), (16384, 64, 1.0), (65536, 64, 1.0)],
    ],
)
def test_long_sums_swamp_and_chunks_prevent_it(size: int, chunk: int, ratio: float) -> None:
    assert swamping(size, chunk) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("size", [4096, 16384])
def test_stochastic_sums_do_not_swamp(size: int) -> None:
    assert swamping(size, 1, seed=1) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 2), "exponent_bits 9 is not in the range 0..8"),
        ((5, 11), "mantissa_bits 11 is not in the range 0..10"),
        ((0, 0), "needs an exponent or a mantissa"),
        ((8, 7), "beyond float32"),
        ((5, 2, 200), "beyond float32"),
        ((2, 1, None, 7), r"reserved_codes 7 is not in the range 0\.\.6"),
        ((0, 7, 0, 0, False), "has only subnormals"),
    ],
)
def test_impossible_formats_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FloatFormat(*arguments)


def test_arguments_of_the_kernels_are_checked() -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="differ in size"):
        _core.round_values(ISAS[0], 1, kernel_numbers(E5M2), None, x, x[:2])
    square = np.zeros((2, 2), np.float32)
    for shapes, chunk, message in [
        ((square, square[:1], square), 1, r"lhs must be \[m, k\]"),
        ((square, square, square), 0, "at least one product"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.multiply_rounded(ISAS[0], 1, kernel_numbers(E5M2), None, chunk, *shapes)
    with pytest.raises(ValueError, match="AFPQ_ISA"):
        _core.round_values("mmx", 1, kernel_numbers(E5M2), None, x, x)


def test_all_isas_are_here() -> None:
    assert len({*itertools.chain(ISAS)}) == len(ISAS) and "scalar" in ISAS
