"""The kernels that round floats to bytes or words, or turn planes into rows, against their definitions in NumPy."""

import numpy as np
import pytest
from kernel_arrays import INF, Array, assert_same_bits, floats, guarded, output
from kernel_rounding import SCALES, encoded, quantize, words_of

from afpq import _core
from afpq.formats import AfpFormat, all_formats, magnitudes

kernels = _core.kernels


def find_range(isa: str, src: Array) -> tuple[np.float32, np.float32, bool]:
    """Smallest and largest of the elements and 0, and whether all are finite, by the bits that the kernel finds."""
    above, below = kernels.range_f32(isa, guarded(src))
    # The definition: the largest of the bits of 0 and of all elements, as signed integers and as unsigned ones.
    bits = int(src.view(np.int32).max(initial=0)), int(src.view(np.uint32).max(initial=0))
    assert (above, below) == bits
    high, low = np.array([above, below if below > 2**31 else 0], np.uint32).view(np.float32)
    return low, high, above < 0x7F800000 and below < 0xFF800000


@pytest.mark.parametrize("count", [*range(71), 200])
def test_range_spans_zero_and_all_elements(isa: str, count: int) -> None:
    src = floats(np.random.default_rng(count), count)
    for shift in (0, 10, -10):
        shifted = src + np.float32(shift)
        low, high, finite = find_range(isa, shifted)
        assert (low, high) == (shifted.min(initial=0), shifted.max(initial=0))
        assert finite


@pytest.mark.parametrize("special", [np.nan, -np.nan, np.inf, -np.inf])
def test_range_finds_a_special_value_wherever_it_is(isa: str, special: float) -> None:
    for count in (1, 8, 16, 17, 70, 130):
        for at in range(count):
            src = np.ones(count, np.float32)
            src[at] = special
            assert not find_range(isa, src)[2], (count, at)


def test_range_of_negative_zeros_is_positive_zero(isa: str) -> None:
    low, high, finite = find_range(isa, np.full(70, -0.0, np.float32))
    assert not np.signbit(low) and not np.signbit(high) and finite


# Beyond both ends, and many ties.
QUANTIZERS = [(1, 100.0, 131), (1, 2.0, 0), (1, 30000.0, 255), (2, 9000.0, 32768), (2, 2.0, 65535)]


@pytest.mark.parametrize(("planes", "inverse_scale", "zero_point"), QUANTIZERS)
def test_quantize_rounds_and_clamps(
    isa: str, planes: int, inverse_scale: float, zero_point: int
) -> None:
    for count in (*range(71), 128, 131):
        src = floats(np.random.default_rng(count), count)
        src[::3] = np.rint(src[::3] * 8) / 4
        src = np.clip(src, -65536 / inverse_scale, 65536 / inverse_scale)
        with output((planes, count), np.uint8) as dst:
            kernels.quantize_u8_f32(isa, guarded(src), inverse_scale, zero_point, dst)
            assert_same_bits(dst, quantize(src, inverse_scale, zero_point, planes), count)


@pytest.mark.parametrize(("planes", "inverse_scale", "zero_point"), QUANTIZERS)
def test_quantize_to_words_holds_the_same_numbers(
    isa: str, planes: int, inverse_scale: float, zero_point: int
) -> None:
    for count in (*range(71), 128, 131):
        src = floats(np.random.default_rng(count), count)
        src[::3] = np.rint(src[::3] * 8) / 4
        src = np.clip(src, -65536 / inverse_scale, 65536 / inverse_scale)
        with output((count,), np.int16) as dst:
            kernels.quantize_s16_f32(isa, guarded(src), inverse_scale, zero_point, 256**planes, dst)
            assert_same_bits(dst, words_of(quantize(src, inverse_scale, zero_point, planes)), count)


@pytest.mark.parametrize("count", [1, 3, 7, 8, 15, 16, 17, 49, 70])
@pytest.mark.parametrize("planes", [1, 2])
def test_quantize_transpose_to_words_makes_rows_of_channels(
    isa: str, planes: int, count: int
) -> None:
    inverse_scale, zero_point = (100.0, 131) if planes == 1 else (9000.0, 32768)
    for channels in (*range(1, 42), 63, 64, 96, 144):
        src = floats(np.random.default_rng(channels), channels, count + channels % 2 * 5)
        q = quantize(src[:, :count], inverse_scale, zero_point, planes)
        with output((count, channels), np.int16) as dst:
            kernels.quantize_transpose_s16_f32(
                isa, guarded(src), inverse_scale, zero_point, 256**planes, dst
            )
            assert_same_bits(dst, words_of(q).T, channels)


@pytest.mark.parametrize("planes", [1, 2])
def test_nan_quantizes_to_zero(isa: str, planes: int) -> None:
    src = np.array([np.nan, np.inf, -np.inf, 1.0] * 10, np.float32)
    with output((planes, 40), np.uint8, 7) as dst:
        kernels.quantize_u8_f32(isa, guarded(src), 0.0, 0, dst)
        assert (dst == 0).all()


@pytest.mark.parametrize("count", [1, 3, 7, 8, 15, 16, 17, 49, 70])
@pytest.mark.parametrize("planes", [1, 2])
def test_quantize_transpose_makes_rows_of_channels(isa: str, planes: int, count: int) -> None:
    inverse_scale, zero_point = (100.0, 131) if planes == 1 else (9000.0, 32768)
    for channels in (*range(1, 42), 63, 64, 96, 144):
        src = floats(np.random.default_rng(channels), channels, count + channels % 2 * 5)
        q = quantize(src[:, :count], inverse_scale, zero_point, planes)
        with output((planes, count, channels), np.uint8) as dst:
            kernels.quantize_transpose_u8_f32(isa, guarded(src), inverse_scale, zero_point, dst)
            assert_same_bits(dst, q.swapaxes(1, 2), channels)


# Formats of activations: integers that fit a byte, with a mantissa.
BYTE_FORMATS = [fmt for fmt in (*all_formats(), *all_formats(signed=False)) if fmt.fits_activations]


def hard_cases(fmt: AfpFormat, scale: np.float32) -> Array:
    """Every value, every midpoint and its neighbours, both signs, and values beyond the largest."""
    levels = magnitudes(fmt)
    points = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, levels[-1:] * 1.5])
    x = (points * scale).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(INF))])
    largest = np.array([0.0, 3e38, 1e-45], np.float32)
    return np.concatenate([x, -x, largest, -largest])


@pytest.mark.parametrize("fmt", BYTE_FORMATS, ids=str)
def test_quantize_to_a_format_equals_encode(isa: str, fmt: AfpFormat) -> None:
    for scale in SCALES:
        src = hard_cases(fmt, scale)
        with output((1, src.size), np.uint8) as dst:
            kernels.quantize_u8_f32(isa, guarded(src), 0.0, 0, dst, str(fmt), scale)
            assert_same_bits(dst[0], encoded(src, fmt, scale), scale)
        with output((src.size,), np.int16) as words:
            kernels.quantize_s16_f32(isa, guarded(src), 0.0, 0, 256, words, str(fmt), scale)
            assert_same_bits(words, encoded(src, fmt, scale).astype(np.int16), scale)


@pytest.mark.parametrize("count", [1, 7, 8, 16, 17, 49])
@pytest.mark.parametrize("text", ["e0m7", "e2m4", "ue1m7", "ue2m5"])
def test_quantize_transpose_to_a_format_equals_encode(isa: str, text: str, count: int) -> None:
    fmt = AfpFormat.parse(text)
    for channels in (*range(1, 42), 63, 64, 96, 144):
        src = floats(np.random.default_rng(channels), channels, count + channels % 2 * 5)
        with output((1, count, channels), np.uint8) as dst:
            kernels.quantize_transpose_u8_f32(isa, guarded(src), 0.0, 0, dst, text, SCALES[1])
            assert_same_bits(dst[0], encoded(src[:, :count].T, fmt, SCALES[1]), channels)
        with output((count, channels), np.int16) as words:
            kernels.quantize_transpose_s16_f32(
                isa, guarded(src), 0.0, 0, 256, words, text, SCALES[1]
            )
            assert_same_bits(words, dst[0].astype(np.int16), channels)


def test_other_formats_are_no_formats_of_activations() -> None:
    for fmt in {*all_formats(), *all_formats(signed=False)} - set(BYTE_FORMATS):
        with pytest.raises(ValueError, match="no such format of activations"):
            kernels.quantize_u8_f32(
                "scalar", np.zeros(1, np.float32), 0.0, 0, np.zeros((1, 1), np.uint8), str(fmt), 1.0
            )


def test_nan_quantizes_to_the_lowest_integer_of_a_format(isa: str) -> None:
    src = np.full(40, np.nan, np.float32)
    for text, lowest in (("e0m7", 1), ("e2m4", 4), ("ue2m5", 0)):
        with output((1, 40), np.uint8, 7) as dst:
            kernels.quantize_u8_f32(isa, guarded(src), 0.0, 0, dst, text, 1.0)
            assert (dst == lowest).all()


@pytest.mark.parametrize("count", [1, 3, 7, 8, 15, 16, 17, 49, 70])
def test_transpose_makes_rows_of_channels(isa: str, count: int) -> None:
    for channels in (*range(1, 42), 63, 64, 96, 144):
        src = floats(np.random.default_rng(channels), channels, count + channels % 2 * 5)
        with output((count, channels), np.float32) as dst:
            kernels.transpose_f32(isa, guarded(src), dst)
            assert_same_bits(dst, src[:, :count].T, channels)
