import numpy as np
import pytest

from afpq.calibrate import Stats, TensorStats
from afpq.correct import can_correct, correct_bias, correct_biases
from afpq.errors import PlanError
from afpq.formats import AfpFormat
from afpq.graph import ConvSpec, Layer
from afpq.rounding import best_scale, fake_quantize_rows

RNG = np.random.default_rng(0)


def make_layer(
    n: int, k: int, *, groups: int = 1, bias: bool = True, kind: str = "matmul"
) -> Layer:
    weight = RNG.standard_normal((n, k)).astype(np.float32)
    return Layer(
        name="layer",
        kind=kind,
        op_type="Conv" if kind == "conv" else "Gemm",
        weight_name="w",
        weight=weight,
        input_name=None if kind == "gather" else "x",
        output_name="y",
        bias=RNG.standard_normal(n).astype(np.float32) if bias else None,
        groups=groups,
        conv=ConvSpec((1,), (1,), (0, 0), (1,)) if kind == "conv" else None,
    )


def make_stats(x: np.ndarray) -> TensorStats:
    """Statistics of inputs [positions, groups, k]."""
    histogram = np.zeros(64, np.int64)
    return TensorStats(len(x), x.mean(0), (x**2).mean(0), float(x.min()), float(x.max()), histogram)


def rounded(layer: Layer) -> np.ndarray:
    fmt = AfpFormat(0, 2)
    return fake_quantize_rows(layer.weight, fmt, best_scale(layer.weight, fmt)[0])


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_correction_restores_the_mean_of_every_channel(groups: int, bias: bool) -> None:
    layer = make_layer(6, 8, groups=groups, bias=bias, kind="conv")
    x = RNG.standard_normal((500, groups, 8)) + 1.5
    quantized = rounded(layer)

    corrected = correct_bias(layer, make_stats(x), quantized)

    def mean(weight: np.ndarray) -> np.ndarray:
        return np.einsum("pgk,gnk->pgn", x, weight.reshape(groups, -1, 8)).mean(0).reshape(-1)

    bias_before = np.zeros(6) if layer.bias is None else layer.bias
    np.testing.assert_allclose(
        mean(quantized) + corrected, mean(layer.weight) + bias_before, atol=1e-5
    )
    assert corrected.dtype == np.float32
    assert np.abs(mean(quantized) - mean(layer.weight)).max() > 0.1


def test_exact_weights_leave_the_bias_alone() -> None:
    layer = make_layer(4, 3)
    corrected = correct_bias(layer, make_stats(RNG.random((9, 1, 3))), layer.weight)
    np.testing.assert_array_equal(corrected, layer.bias)


def test_zero_mean_inputs_leave_the_bias_alone() -> None:
    layer = make_layer(4, 3)
    x = RNG.random((9, 1, 3))
    corrected = correct_bias(layer, make_stats(np.concatenate([x, -x])), rounded(layer))
    np.testing.assert_allclose(corrected, layer.bias, atol=1e-6)


def test_only_layers_with_statistics_and_a_bias_are_corrected() -> None:
    layer, table = make_layer(4, 3), make_layer(4, 3, kind="gather")
    stats = Stats({"layer": make_stats(RNG.random((9, 1, 3)))}, 9, "")

    assert can_correct(layer) and not can_correct(table)
    assert set(correct_biases((layer,), stats, {"w": rounded(layer)})) == {"layer"}
    assert correct_biases((table,), stats, {"w": rounded(layer)}) == {}
    assert correct_biases((layer,), Stats({}, 9, ""), {"w": rounded(layer)}) == {}
    assert correct_biases((layer,), stats, {}) == {}


def test_shapes_that_do_not_fit_are_named() -> None:
    layer = make_layer(4, 3)
    with pytest.raises(
        PlanError, match=r"layer 'layer': quantized weight \[4, 2\] is not \[4, 3\]"
    ):
        correct_bias(layer, make_stats(RNG.random((9, 1, 3))), np.zeros((4, 2), np.float32))
    with pytest.raises(PlanError, match=r"layer 'layer': input means \[3, 3\] do not fit"):
        correct_bias(layer, make_stats(RNG.random((9, 3, 3))), rounded(layer))
