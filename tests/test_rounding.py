import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afpq import _core
from afpq.errors import FormatError
from afpq.formats import AfpFormat, all_formats, encode, fake_quantize, magnitudes, round_scale
from afpq.packing import pack
from afpq.rounding import best_scale, fake_quantize_rows, quantize_tensor, scale_bits

FORMATS = [*all_formats(), *all_formats(signed=False)]


def around_midpoints(fmt: AfpFormat) -> np.ndarray:
    """Every level and midpoint in units of I, their float32 neighbours, and numbers far beyond; both signs."""
    levels = magnitudes(fmt).astype(np.float32)
    points = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, levels[-1:] * 3])
    up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    x = np.concatenate([points, up, down, np.array([1e-42, 3e38, -0.0], np.float32)])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 0.0078735, 1.3359375, 5e4])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_native_encode_equals_the_definition(fmt: AfpFormat, scale: float) -> None:
    s = round_scale(fmt, scale, "real")
    with np.errstate(over="ignore"):
        x = np.unique(around_midpoints(fmt) * s)
    x = np.append(x[np.isfinite(x)], np.float32(-0.0))

    codes = _core.encode_rows(x[None], str(fmt), s.reshape(1), 1)

    np.testing.assert_array_equal(codes[0], encode(x, fmt, s))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30))
def test_native_encode_equals_the_definition_on_random_rows(
    fmt: AfpFormat, seed: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((5, 23)) * np.exp(rng.standard_normal((5, 1)))).astype(np.float32)
    w *= np.float32(size)
    s = np.abs(w).max(1) / np.float32(fmt.max_integer) * rng.random(5).astype(np.float32)
    s = round_scale(fmt, np.maximum(s, np.float32(1e-37)), "real")

    np.testing.assert_array_equal(_core.encode_rows(w, str(fmt), s, 3), encode(w, fmt, s[:, None]))
    np.testing.assert_array_equal(fake_quantize_rows(w, fmt, s), fake_quantize(w, fmt, s[:, None]))


@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_reported_error_is_the_error_of_the_chosen_scale(fmt: AfpFormat, kind: str) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 37)).astype(np.float32)
    energy = rng.random((2, 37)) * 40

    scale, error = best_scale(w, fmt, energy, kind=kind)

    np.testing.assert_array_equal(scale, round_scale(fmt, scale, kind))
    difference = w.astype(np.float64) - fake_quantize(w, fmt, scale[:, None])
    expected = (difference**2 * np.repeat(energy, 3, axis=0)).sum(1)
    np.testing.assert_allclose(error, expected, rtol=1e-6)


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
@pytest.mark.parametrize("k", [1, 9, 15, 16, 17, 200])
def test_search_is_as_good_as_a_dense_scan_of_scales(fmt: AfpFormat, k: int) -> None:
    rng = np.random.default_rng(k)
    w = rng.laplace(size=(8, k)).astype(np.float32)
    energy = rng.random((1, k))

    _, error = best_scale(w, fmt, energy)

    factors = np.geomspace(0.12, 1.06, 400)
    dense = np.full(8, np.inf)
    for f in factors:
        s = round_scale(fmt, np.abs(w).max(1) / np.float32(fmt.max_integer) * np.float32(f), "real")
        d = w.astype(np.float64) - fake_quantize(w, fmt, s[:, None])
        dense = np.minimum(dense, (d * d * energy).sum(1))
    # A row of a few weights has a ragged error, and the search looks at some forty scales.
    signal = (w.astype(np.float64) ** 2 * energy).sum(1)
    assert (error.sum() <= 1.25 * dense.sum()) or (error - dense < 1e-4 * signal).all()


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_integer_kind_finds_the_best_power_of_two(fmt: AfpFormat) -> None:
    w = np.random.default_rng(3).laplace(size=(10, 50)).astype(np.float32)

    _, error = best_scale(w, fmt, kind="integer")

    powers = np.exp2(np.arange(-40.0, 8.0)).astype(np.float32)
    every = [((w.astype(np.float64) - fake_quantize(w, fmt, p)) ** 2).sum(1) for p in powers]
    # Two binades below "the maximum fits" is far enough but for formats of three bits and fewer.
    np.testing.assert_allclose(error, np.min(every, axis=0), rtol=1e-6)


def test_clipping_is_chosen_when_it_pays() -> None:
    w = np.random.default_rng(0).standard_normal((1, 4000)).astype(np.float32)
    fmt = AfpFormat(0, 3)

    scale, _ = best_scale(w, fmt)

    assert scale[0] * fmt.max_integer < 0.85 * np.abs(w).max()


def test_an_outlier_that_no_input_excites_is_clipped() -> None:
    w = np.full((1, 64), 0.5, np.float32)
    w[0, 0] = 2.0
    energy = np.ones((1, 64))
    energy[0, 0] = 0

    scale, error = best_scale(w, AfpFormat(0, 3), energy)

    assert error[0] < 1e-4
    assert scale[0] * 7 < 1.5


def test_per_tensor_scale_is_common_and_better_than_its_neighbours() -> None:
    w = np.random.default_rng(1).standard_normal((7, 30)).astype(np.float32)
    fmt = AfpFormat(2, 2)

    scale, error = best_scale(w, fmt, granularity="per_tensor")

    assert scale.shape == (1,) and error.shape == (7,)
    for factor in (0.9, 1.1):
        other = round_scale(fmt, scale * np.float32(factor), "real")
        assert error.sum() <= ((w - fake_quantize(w, fmt, other)) ** 2).sum()


@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_zero_rows_get_a_storable_scale_and_no_error(kind: str, granularity: str) -> None:
    w = np.zeros((3, 5), np.float32)

    scale, error = best_scale(w, AfpFormat(2, 1), kind=kind, granularity=granularity)

    assert (scale == 1).all()
    assert (error == 0).all()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("fmt", [AfpFormat(0, 1), AfpFormat(2, 1), AfpFormat(5, 2)], ids=str)
@pytest.mark.parametrize("kind", ["real", "integer"])
def test_extreme_weights_get_storable_scales(size: float, fmt: AfpFormat, kind: str) -> None:
    w = np.array([[size, -size / 2, 0.0]], np.float32)

    for granularity in ("per_channel", "per_tensor"):
        scale, _ = best_scale(w, fmt, kind=kind, granularity=granularity)
        packed = quantize_tensor(w, fmt, scale, kind=kind)
        assert np.isfinite(packed.decode()).all()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((37, 19)).astype(np.float32)
    energy = rng.random((37, 19))

    for granularity in ("per_channel", "per_tensor"):
        results = [
            best_scale(w, AfpFormat(2, 1), energy, granularity=granularity, num_threads=t)
            for t in (1, 2, 3, 64)
        ]
        for scale, error in results[1:]:
            np.testing.assert_array_equal(scale, results[0][0])
            np.testing.assert_array_equal(error, results[0][1])


def test_scaling_weights_by_a_power_of_two_scales_the_result() -> None:
    w = np.random.default_rng(6).standard_normal((4, 33)).astype(np.float32)

    one, error = best_scale(w, AfpFormat(3, 1))
    eight, error_eight = best_scale(8 * w, AfpFormat(3, 1))

    np.testing.assert_array_equal(eight, 8 * one)
    np.testing.assert_allclose(error_eight, 64 * error, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 16, 17, 50])
def test_quantize_tensor_packs_the_nearest_codes(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afpq.rounding._CHUNK_CODES", 100)  # two pieces and more
    w = np.random.default_rng(n).standard_normal((n, 7)).astype(np.float32)
    fmt = AfpFormat(2, 2)
    scale, _ = best_scale(w, fmt)

    tensor = quantize_tensor(w, fmt, scale)

    np.testing.assert_array_equal(tensor.data, pack(encode(w, fmt, scale[:, None]), fmt.bits))
    np.testing.assert_array_equal(tensor.decode(), fake_quantize(w, fmt, scale[:, None]))
    assert tensor.storage_bits == 8 * tensor.data.size + 16 * n
    assert (scale_bits("real"), scale_bits("integer")) == (16, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: best_scale(w * np.nan, AfpFormat(2, 1)), "finite"),
        (lambda w: best_scale(w[0], AfpFormat(2, 1)), "got 1 axes"),
        (lambda w: best_scale(w, AfpFormat(2, 1), kind="exact"), "'exact' is not one of real"),
        (lambda w: best_scale(w, AfpFormat(2, 1), granularity="row"), "'row' is not one of"),
        (lambda w: best_scale(w, AfpFormat(2, 1), np.ones((1, 3))), r"energy \[1, 3\]"),
        (lambda w: best_scale(w, AfpFormat(2, 1), np.ones((3, 5))), r"energy \[3, 5\]"),
        (lambda w: best_scale(w, AfpFormat(2, 1), -np.ones((1, 5))), "not negative"),
        (lambda w: quantize_tensor(w, AfpFormat(2, 1), np.ones(3, np.float32)), "4 scales or 1"),
        (lambda w: quantize_tensor(w, AfpFormat(2, 1), np.zeros(1, np.float32)), "positive"),
        (
            lambda w: quantize_tensor(w, AfpFormat(2, 1), np.full(1, 1.2, np.float32)),
            "cannot be stored as kind 'real'",
        ),
        (
            lambda w: quantize_tensor(
                w, AfpFormat(2, 1), np.full(1, 1.5, np.float32), kind="integer"
            ),
            "cannot be stored as kind 'integer'",
        ),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call(np.ones((4, 5), np.float32))


def test_the_binding_refuses_what_does_not_fit() -> None:
    w = np.ones((4, 5), np.float32)
    with pytest.raises(ValueError, match="no such format: e9m9"):
        _core.search_scales(w, None, "e9m9", "real", 1)
    with pytest.raises(ValueError, match="got 2 scales for 4 rows"):
        _core.encode_rows(w, "e2m1", np.ones(2, np.float32), 1)
    with pytest.raises(ValueError, match=r"energy \[3, 5\] does not fit weight \[4, 5\]"):
        _core.scale_errors(w, np.ones((3, 5), np.float32), "e2m1", np.ones(1, np.float32), 1)
