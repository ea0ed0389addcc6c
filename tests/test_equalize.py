"""Equalisation: which channels may have factors, and that the float network computes what it did."""

from pathlib import Path

import graphs
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import build, constant, node, write

import afpq
from afpq._pairs import find_pairs
from afpq.calibrate import calibrate
from afpq.data import Data, open_data
from afpq.equalize import Equalized, equalize
from afpq.errors import PlanError
from afpq.formats import AfpFormat
from afpq.graph import Model, load_model
from afpq.rounding import best_scale, fake_quantize_rows
from afpq.runtime import FloatModel

PADS = {"pads": [1, 1, 1, 1]}
IMAGE = {"x": ["n", 4, 6, 6]}
ROWS = {"x": ["n", 12]}


def uneven(array: np.ndarray, axis: int, seed: int = 0) -> np.ndarray:
    """Channels of very different sizes."""
    sizes = np.exp2(np.random.default_rng(seed).uniform(-5, 5, array.shape[axis]))
    shape = [1] * array.ndim
    shape[axis] = -1
    return (array * sizes.reshape(shape)).astype(np.float32)


def load(
    folder: Path, nodes: list, inputs: dict, constants: dict, outputs: tuple = ("y",)
) -> Model:
    return load_model(write(folder, build(nodes, inputs, constants, outputs)))


def samples(model: Model, count: int = 32) -> Data:
    shapes = {info.name: info.shape[1:] for info in model.inputs if info.shape}
    return open_data({n: constant(count, *s, seed=9) for n, s in shapes.items()}, model.inputs)


def run(model: Model, data: Data) -> np.ndarray:
    return FloatModel(model, threads=1).run(next(data.batches(32)))[0]


def equalized(model: Model, data: Data, **options: int) -> Equalized:
    return equalize(model, calibrate(model, data), data, **options)


def names(model: Model) -> list[tuple[str, list[str]]]:
    return [(pair.name, [layer.name for layer, _ in pair.readers]) for pair in find_pairs(model)]


def convolutions() -> dict[str, np.ndarray]:
    return {
        "w0": uneven(constant(16, 4, 3, 3), 0),
        "b0": uneven(constant(16, seed=1), 0),
        "w1": uneven(constant(12, 16, 3, 3, seed=2), 1, seed=1),
    }


# From a conv to its reader: what stands between them, and what the reader is.
WAYS = {
    "relu": ([node("Relu", "a", "b"), node("Conv", "b w1", "y", **PADS)], {}),
    "leaky_relu": (
        [node("LeakyRelu", "a", "b", alpha=0.1), node("Conv", "b w1", "y", **PADS)],
        {},
    ),
    "pools": (
        [
            node("MaxPool", "a", "b", kernel_shape=[2, 2]),
            node("AveragePool", "b", "c", kernel_shape=[2, 2]),
            node("Identity", "c", "d"),
            node("Conv", "d w1", "y", **PADS),
        ],
        {},
    ),
    "two_readers": (
        [
            node("Relu", "a", "b"),
            node("Conv", "b w1", "c", **PADS),
            node("Conv", "b w2", "d"),
            node("Add", "c d", "y"),
        ],
        {"w2": uneven(constant(12, 16, 1, 1, seed=3), 1, seed=2)},
    ),
    "flatten": (
        [node("Flatten", "a", "b"), node("Gemm", "b w2", "y", transB=1)],
        {"w2": uneven(constant(10, 16 * 36, seed=3), 1, seed=2)},
    ),
    "global_pool": (
        [
            node("GlobalAveragePool", "a", "b"),
            node("Flatten", "b", "c"),
            node("MatMul", "c w2", "y"),
        ],
        {"w2": uneven(constant(16, 10, seed=3), 0, seed=2)},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_float_function_is_unchanged_to_rounding(way: str, tmp_path: Path) -> None:
    nodes, constants = WAYS[way]
    first = node("Conv", "x w0 b0", "a", **PADS)
    model = load(tmp_path, [first, *nodes], IMAGE, convolutions() | constants)
    data = samples(model)

    result = equalized(model, data)

    assert list(result.factors) == ["conv_a"]
    assert np.ptp(np.log2(result.factors["conv_a"])) > 1
    wanted = run(model, data)
    np.testing.assert_allclose(run(result.model, data), wanted, atol=2e-6 * np.abs(wanted).max())
    layer = result.model.layer("conv_a")
    np.testing.assert_allclose(
        layer.weight * result.factors["conv_a"][:, None], model.layers[0].weight, rtol=1e-6
    )


def output_error(model: Model, bits: int, data: Data) -> float:
    """Of nearest rounding with the scales that calibration asks for."""
    stats = calibrate(model, data)
    fmt = AfpFormat(0, bits - 1)
    weights = {}
    for layer in model.layers:
        scale, _ = best_scale(layer.weight, fmt, stats[layer.name].second_moment)
        weights[layer.weight_name] = fake_quantize_rows(layer.weight, fmt, scale)
    feed = next(data.batches(32))
    wanted, found = run(model, data), FloatModel(model).simulate(weights).run(feed)[0]
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


def test_uneven_channels_are_rounded_better(tmp_path: Path) -> None:
    constants = convolutions()
    # Large inputs meet small weights: the products are alike, the weights are not.
    constants["w0"], constants["b0"] = constant(16, 4, 3, 3), constant(16, seed=1)
    constants["w1"] = constant(12, 16, 3, 3, seed=2)
    sizes = np.exp2(np.linspace(-6, 6, 16)).astype(np.float32)
    constants["w0"] = constants["w0"] * sizes[:, None, None, None]
    constants["b0"] = constants["b0"] * sizes
    constants["w1"] = constants["w1"] / sizes[None, :, None, None]
    nodes = [node("Conv", "x w0 b0", "a", **PADS), *WAYS["relu"][0]]
    model = load(tmp_path, nodes, IMAGE, constants)
    data = samples(model)

    result = equalized(model, data)

    assert output_error(result.model, 4, data) < output_error(model, 4, data) / 4


OLD = pytest.mark.skipif(
    ort.__version__.startswith("1.17."),
    reason="onnxruntime 1.17 aborts on a LayerNormalization without bias before a MatMul",
)


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=OLD)])
def test_layer_norm_divides_its_gamma_and_beta(tmp_path: Path, bias: bool) -> None:
    nodes = [
        node("LayerNormalization", "x gamma beta" if bias else "x gamma", "a"),
        node("MatMul", "a w0", "q"),
        node("MatMul", "a w1", "k"),
        node("Add", "q k"),
    ]
    constants = {
        "gamma": uneven(constant(12), 0),
        "w0": uneven(constant(12, 10, seed=1), 0, seed=1),
        "w1": uneven(constant(12, 10, seed=2), 0, seed=2),
    } | ({"beta": constant(12, seed=3)} if bias else {})
    model = load(tmp_path, nodes, ROWS, constants)
    data = samples(model)

    result = equalized(model, data)

    assert names(model) == [("layernormalization_a", ["matmul_q", "matmul_k"])]
    assert result.factors
    wanted = run(model, data)
    np.testing.assert_allclose(run(result.model, data), wanted, atol=2e-6 * np.abs(wanted).max())


def test_norms_of_several_nodes_and_gates_pass(tmp_path: Path) -> None:
    """RMSNorm as exporters write it, and the linear side of a gated unit."""
    nodes = [
        node("ReduceL2", "x", "r", axes=[-1], keepdims=1),
        node("Div", "x r", "n"),
        node("Mul", "n gamma", "a"),
        node("MatMul", "a w0", "g"),
        node("MatMul", "a w1", "v"),
        node("Sigmoid", "g", "s"),
        node("Mul", "s v", "h"),
        node("MatMul", "h w2"),
    ]
    constants = {
        "gamma": uneven(constant(12), 0),
        "w0": constant(12, 10, seed=1),
        "w1": uneven(constant(12, 10, seed=2), 1),
        "w2": uneven(constant(10, 8, seed=3), 0, seed=1),
    }
    model = load(tmp_path, nodes, ROWS, constants)
    data = samples(model)

    assert names(model) == [("mul_a", ["matmul_g", "matmul_v"]), ("matmul_v", ["matmul_y"])]
    result = equalized(model, data)
    assert "matmul_v" in result.factors
    wanted = run(model, data)
    np.testing.assert_allclose(run(result.model, data), wanted, atol=2e-6 * np.abs(wanted).max())


def test_batch_normalization_divides_its_gamma_and_beta(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w0 b0", "a", **PADS),
        node("BatchNormalization", "a gamma beta mean variance", "b"),
        node("Relu", "b", "c"),
        node("Conv", "c w1", "y", **PADS),
    ]
    constants = convolutions() | {
        "gamma": uneven(constant(16, seed=4), 0),
        "beta": constant(16, seed=5),
        "mean": constant(16, seed=6),
        "variance": np.abs(constant(16, seed=7)) + 1,
    }
    model = load(tmp_path, nodes, IMAGE, constants)
    data = samples(model)

    result = equalized(model, data)

    assert list(result.factors) == ["batchnormalization_b"]
    wanted = run(model, data)
    np.testing.assert_allclose(run(result.model, data), wanted, atol=2e-6 * np.abs(wanted).max())


def clipped(folder: Path, sizes: np.ndarray) -> Model:
    nodes = [
        node("Conv", "x w0 b0", "a"),
        node("Clip", "a zero six", "b"),
        node("Conv", "b w1", "y"),
    ]
    weight = np.abs(constant(16, 4, 1, 1))
    weight /= np.abs(weight).sum(1, keepdims=True)
    constants = {
        "w0": (weight * sizes[:, None, None, None]).astype(np.float32),
        "b0": np.zeros(16, np.float32),
        "w1": uneven(constant(12, 16, 1, 1, seed=2), 1, seed=1),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    return load(folder, nodes, IMAGE, constants)


def test_relu6_channels_that_are_cut_keep_their_factor_one(tmp_path: Path) -> None:
    sizes = np.where(np.arange(16) % 2, 0.3, 20.0)  # every other channel is cut at 6
    model = clipped(tmp_path, sizes)
    data = samples(model)

    result = equalized(model, data)

    factor = result.factors["conv_a"]
    np.testing.assert_array_equal(factor[::2], 1.0)
    assert np.any(factor[1::2] != 1.0)
    before_clip = FloatModel(result.model).run(next(data.batches(32)), ["a"])[0].max((0, 2, 3))
    assert (before_clip[1::2] < 3.01).all()  # far from 6 after dividing, too
    wanted = run(model, data)
    np.testing.assert_allclose(run(result.model, data), wanted, atol=2e-6 * np.abs(wanted).max())


def test_relu6_without_samples_is_left_alone(tmp_path: Path) -> None:
    model = clipped(tmp_path, np.full(16, 0.3))

    assert equalize(model, calibrate(model, samples(model))).factors == {}


# What must not have factors: (nodes after `a`, constants, outputs).
BLOCKED = {
    "sigmoid": ([node("Sigmoid", "a", "b"), node("Conv", "b w1", "y", **PADS)], {}, ("y",)),
    "residual": (
        [node("Conv", "a w1", "b", **PADS), node("Relu", "a", "c"), node("Concat", "b c", axis=1)],
        {},
        ("y",),
    ),
    "output": ([node("Conv", "a w1", "y", **PADS)], {}, ("y", "a")),
    "clip_below_zero": (
        [node("Clip", "a low", "b"), node("Conv", "b w1", "y", **PADS)],
        {"low": np.float32(-1)},
        ("y",),
    ),
    "depthwise_reader": (
        [node("Conv", "a w2", "y", group=16)],
        {"w2": constant(16, 1, 3, 3)},
        ("y",),
    ),
    "shared_reader": (
        [
            node("Conv", "a w1", "b", **PADS),
            node("Conv", "z w1", "c", **PADS),
            node("Add", "b c"),
        ],
        {"z": constant(1, 16, 6, 6)},
        ("y",),
    ),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_channels_that_others_read_are_left_alone(case: str, tmp_path: Path) -> None:
    nodes, constants, outputs = BLOCKED[case]
    first = node("Conv", "x w0 b0", "a", **PADS)

    model = load(tmp_path, [first, *nodes], IMAGE, convolutions() | constants, outputs)

    assert names(model) == []


def test_shared_producers_are_left_alone(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("MatMul", "a w", "b"),
        node("Relu", "b", "c"),
        node("MatMul", "c v"),
    ]
    model = load(tmp_path, nodes, ROWS, {"w": constant(12, 12), "v": constant(12, 8)})

    assert names(model) == []


def test_squares_have_no_factor(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Relu", "a", "b"),
        node("Mul", "a b", "c"),
        node("MatMul", "c v"),
    ]
    model = load(tmp_path, nodes, ROWS, {"w": constant(12, 12), "v": constant(12, 8)})

    assert names(model) == []


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    model = load(
        tmp_path, [node("Conv", "x w0 b0", "a", **PADS), *WAYS["relu"][0]], IMAGE, convolutions()
    )
    data = samples(model)
    before = run(model, data)

    equalized(model, data)

    np.testing.assert_array_equal(run(model, data), before)
    assert [i.name for i in onnx.load(model.path).graph.initializer] == ["w0", "b0", "w1"]


def test_widths_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, graphs.CASES["matmul"].model()))

    with pytest.raises(PlanError, match=r"bits 9 is not in the range 2\.\.8"):
        equalize(model, calibrate(model, {"x": constant(8, 3, 12)}), bits=9)


def test_quantize_keeps_the_better_of_both_models(tmp_path: Path) -> None:
    models = Path(__file__).resolve().parents[1] / "models"
    result = afpq.quantize(
        models / "resnet_digits.onnx",
        data=models / "digits_calibration.npz",
        samples=32,
        bits=4,
        mode="quick",
        equalize=True,
    )

    assert result.facts.correction is not None
    proof = result.facts.correction["equalization"]
    assert proof["pairs"] > 0
    assert proof["kept"] == (proof["loss_after"] < proof["loss_before"])
    least = min(proof["loss_before"], proof["loss_after"])
    assert least == min(result.facts.correction["losses"].values())
