"""Restored statistics: planted changes are undone exactly, and real networks come closer to the float one."""

from dataclasses import replace
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from afpq._batchnorm import BatchNorm, batch_norms
from afpq.data import Data, open_data
from afpq.formats import AfpFormat
from afpq.graph import Model, load_model
from afpq.packing import PackedTensor
from afpq.restore import Restored, restore
from afpq.rewrite import rewrite, serialize
from afpq.rounding import best_scale, quantize_tensor
from afpq.runtime import FloatModel, session

FINE = AfpFormat(0, 7)
NORM = "gamma beta mean variance"


def norm_constants(channels: int, name: str = "", seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = {
        "gamma": rng.uniform(0.5, 2, channels),
        "beta": rng.normal(size=channels),
        "mean": rng.normal(size=channels),
        "variance": rng.uniform(0.5, 2, channels),
    }
    return {f"{key}{name}": array.astype(np.float32) for key, array in values.items()}


def pre_activation(folder: Path) -> Model:
    """conv, then twice BN - Relu - conv around a sum: no BatchNormalization can be folded into a layer before it."""
    conv = {"pads": [1, 1, 1, 1]}
    nodes = [
        graphs.node("Conv", "x w0", "a", **conv),
        graphs.node("BatchNormalization", "a gamma1 beta1 mean1 variance1", "b", epsilon=1e-3),
        graphs.node("Relu", "b", "c"),
        graphs.node("Conv", "c w1", "d", **conv),
        graphs.node("Add", "a d", "e"),
        graphs.node("BatchNormalization", "e gamma2 beta2 mean2 variance2", "f"),
        graphs.node("Relu", "f", "g"),
        graphs.node("Conv", "g w2 bias", "y", **conv),
    ]
    constants = {
        "w0": 0.5 * graphs.constant(8, 3, 3, 3),
        "w1": 0.3 * graphs.constant(8, 8, 3, 3, seed=1),
        "w2": 0.3 * graphs.constant(8, 8, 3, 3, seed=2),
        "bias": graphs.constant(8, seed=3),
    }
    constants |= norm_constants(8, "1") | norm_constants(8, "2", seed=6)
    return load_model(graphs.write(folder, graphs.build(nodes, {"x": ["n", 3, 6, 6]}, constants)))


def images(model: Model, count: int = 32, seed: int = 7) -> Data:
    return open_data({"x": graphs.constant(count, 3, 6, 6, seed=seed)}, model.inputs)


def rounded(
    model: Model, fmt: AfpFormat, granularity: str = "per_channel"
) -> dict[str, PackedTensor]:
    result = {}
    for name, layer in model.tensors().items():
        scale, _ = best_scale(layer.weight, fmt, granularity=granularity)
        result[name] = quantize_tensor(layer.weight, fmt, scale)
    return result


def decoded(tensors: dict[str, PackedTensor]) -> dict[str, np.ndarray]:
    return {name: tensor.decode() for name, tensor in tensors.items()}


def outputs(model: Model, data: Data, changed: Restored) -> np.ndarray:
    network = FloatModel(model, threads=1).simulate(
        decoded(changed.tensors), changed.biases, constants=changed.constants
    )
    return np.concatenate([network.run(feed)[0] for feed in data.batches(8)])


def error(model: Model, data: Data, changed: Restored) -> float:
    wanted = np.concatenate([FloatModel(model).run(feed)[0] for feed in data.batches(8)])
    return float(
        np.square(outputs(model, data, changed) - wanted).mean() / np.square(wanted).mean()
    )


def test_planted_scales_and_biases_are_restored(tmp_path: Path) -> None:
    """Channels are made up to four times too large, and moved: scales come back bit for bit."""
    model = pre_activation(tmp_path)
    data, right = images(model), rounded(model, FINE)
    # The float network becomes one that can be stored, so that nothing but the plants has to be restored.
    exact = FloatModel(stored(tmp_path, right))
    rng = np.random.default_rng(0)
    planted = {
        name: replace(t, scale=t.scale * 2.0 ** rng.integers(-1, 3, t.n).astype(np.float32))
        for name, t in right.items()
    }
    biases = {layer.name: rng.normal(size=8).astype(np.float32) for layer in model.layers}

    result = restore(exact, data, planted, biases)

    for layer in model.layers:
        name = layer.weight_name
        np.testing.assert_array_equal(result.tensors[name].scale, right[name].scale)
        wanted = np.zeros(8) if layer.bias is None else layer.bias
        np.testing.assert_allclose(result.biases[layer.name], wanted, atol=1e-5)
    for norm in batch_norms(model):
        np.testing.assert_allclose(result.constants[norm.mean_name], norm.mean, atol=1e-5)
        np.testing.assert_allclose(result.constants[norm.variance_name], norm.variance, rtol=1e-5)


def stored(folder: Path, tensors: dict[str, PackedTensor]) -> Model:
    """The network of `pre_activation` with weights that the tensors hold exactly."""
    proto = onnx.load(folder / "model.onnx")
    for initializer in proto.graph.initializer:
        if initializer.name in tensors:
            shape = tuple(initializer.dims)
            taps_first = tensors[initializer.name].decode().reshape(shape[0], *shape[2:], shape[1])
            values = np.ascontiguousarray(np.moveaxis(taps_first, -1, 1))
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    return load_model(graphs.write(folder, proto, "stored.onnx"))


def test_planted_statistics_are_restored_by_batch_normalization_alone(tmp_path: Path) -> None:
    """The layer before has one scale, four times too large, and cannot take it back."""
    nodes = [
        graphs.node("Conv", "x w0", "a"),
        graphs.node("BatchNormalization", f"a {NORM}", "b", epsilon=1e-2),
        graphs.node("Relu", "b", "c"),
        graphs.node("Conv", "c w1", "y"),
    ]
    weights = {"w0": graphs.constant(8, 3, 3, 3), "w1": graphs.constant(8, 8, 3, 3, seed=1)}
    built = graphs.build(nodes, {"x": ["n", 3, 6, 6]}, norm_constants(8) | weights)
    right = rounded(load_model(graphs.write(tmp_path, built)), FINE, "per_tensor")
    model = stored(tmp_path, right)
    planted = right | {"w0": replace(right["w0"], scale=4 * right["w0"].scale)}
    (norm,) = batch_norms(model)

    result = restore(FloatModel(model, threads=1), images(model), planted, {})

    assert error(model, images(model, seed=9), result) < 1e-10
    variance = 16 * (norm.variance + 1e-2) - 1e-2
    np.testing.assert_allclose(result.constants["variance"], variance, rtol=1e-4)


def test_reestimation_of_true_statistics_gives_those_of_the_changed_input() -> None:
    """HFP8's rule: where mean and variance are the data's own, the new ones are the changed data's."""
    rng = np.random.default_rng(1)
    y, x = rng.normal(1, 2, (1000, 3)), rng.normal(-1, 0.7, (1000, 3))
    norm = BatchNorm(0, "x", "m", "v", y.mean(0), y.var(0), 0.0)
    slope = y.std(0) / x.std(0)

    mean, variance = norm.refitted(slope, y.mean(0) - slope * x.mean(0))

    np.testing.assert_allclose(mean, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-12)


def test_a_variance_below_epsilon_stays_a_variance() -> None:
    norm = BatchNorm(0, "x", "m", "v", np.zeros(1), np.full(1, 1e-8), 1e-3)

    assert norm.refitted(np.full(1, 10.0), np.zeros(1))[1] == 0.0


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_means_and_variances_of_the_float_network_come_back(
    tmp_path: Path, granularity: str
) -> None:
    model = pre_activation(tmp_path)
    data, network = images(model), FloatModel(model, threads=1)
    fetch = [layer.output_name for layer in model.layers]

    result = restore(network, data, rounded(model, AfpFormat(2, 0), granularity), {})

    changed = network.simulate(
        decoded(result.tensors), result.biases, constants=result.constants, fetch=fetch
    )
    feed = next(data.batches(32))
    for wanted, found in zip(network.run(feed, fetch), changed.run(feed), strict=True):
        np.testing.assert_allclose(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-4)
        if granularity == "per_channel":
            # bfloat16 scales.
            np.testing.assert_allclose(found.std((0, 2, 3)), wanted.std((0, 2, 3)), rtol=2**-8)


def test_new_samples_gain_and_the_packed_file_computes_it(tmp_path: Path) -> None:
    model = pre_activation(tmp_path)
    tensors = rounded(model, AfpFormat(2, 0))
    fresh = images(model, 64, seed=11)

    result = restore(FloatModel(model, threads=1), images(model, 64), tensors, {})

    before = error(model, fresh, Restored(tensors, {}, {}))
    assert error(model, fresh, result) < 0.8 * before

    class Summary:
        plan_hash, bits_per_weight = "0", 4.0

    packed = rewrite(
        model,
        Summary(),
        result.tensors,
        result.biases,
        constants=result.constants,
        activations="f32",
    )
    feed = next(fresh.batches(64))
    found = session(serialize(packed), threads=1).run(None, feed)[0]
    np.testing.assert_allclose(found, outputs(model, fresh, result), atol=1e-4)


def test_exact_weights_change_nothing(tmp_path: Path) -> None:
    pre_activation(tmp_path)
    model = load_model(tmp_path / "model.onnx")
    tensors = rounded(model, FINE)
    network = FloatModel(stored(tmp_path, tensors), threads=1)

    result = restore(network, images(model), tensors, {})

    for name, tensor in tensors.items():
        np.testing.assert_array_equal(result.tensors[name].scale, tensor.scale)
    for norm in batch_norms(network.model):
        np.testing.assert_allclose(result.constants[norm.mean_name], norm.mean, atol=1e-6)


def test_channels_that_do_not_vary_keep_their_scale(tmp_path: Path) -> None:
    nodes = [graphs.node("Relu", "x", "r"), graphs.node("MatMul", "r w", "y")]
    weight = graphs.constant(16, 12)
    model = load_model(graphs.write(tmp_path, graphs.build(nodes, {"x": ["n", 16]}, {"w": weight})))
    data = open_data({"x": np.ones((8, 16), np.float32)}, model.inputs)
    tensors = rounded(model, AfpFormat(2, 0))

    result = restore(FloatModel(model, threads=1), data, tensors, {})

    np.testing.assert_array_equal(result.tensors["w"].scale, tensors["w"].scale)
    np.testing.assert_allclose(outputs(model, data, result)[0], weight.sum(0), atol=1e-4)


def test_shared_tensors_keep_their_scales_and_get_two_biases(tmp_path: Path) -> None:
    nodes = [
        graphs.node("MatMul", "x w", "a"),
        graphs.node("Tanh", "a", "b"),
        graphs.node("MatMul", "b w", "y"),
    ]
    constants = {"w": graphs.constant(12, 12)}
    model = load_model(graphs.write(tmp_path, graphs.build(nodes, {"x": ["n", 12]}, constants)))
    data = open_data({"x": graphs.constant(64, 12, seed=1) + 1}, model.inputs)
    tensors = rounded(model, AfpFormat(2, 0))

    result = restore(FloatModel(model, threads=1), data, tensors, {})

    np.testing.assert_array_equal(result.tensors["w"].scale, tensors["w"].scale)
    assert set(result.biases) == {"matmul_a", "matmul_y"}
    assert error(model, data, result) < error(model, data, Restored(tensors, {}, {}))


def test_numbers_that_are_none_leave_a_place_alone(tmp_path: Path) -> None:
    nodes = [graphs.node("Log", "x", "l"), graphs.node("MatMul", "l w", "y")]
    constants = {"w": graphs.constant(12, 12)}
    model = load_model(graphs.write(tmp_path, graphs.build(nodes, {"x": ["n", 12]}, constants)))
    data = open_data({"x": np.zeros((8, 12), np.float32)}, model.inputs)
    tensors = rounded(model, FINE)

    result = restore(FloatModel(model, threads=1), data, tensors, {})

    assert result.biases == {} and result.tensors["w"] is tensors["w"]


def test_normalizations_that_share_constants_are_left_alone(tmp_path: Path) -> None:
    constants = norm_constants(16) | {"w": graphs.constant(4, 16, 1, 1)}
    nodes = [
        graphs.node("BatchNormalization", f"x {NORM}", "b"),
        graphs.node("BatchNormalization", f"b {NORM}", "c"),
        graphs.node("Conv", "c w", "y"),
    ]
    built = graphs.build(nodes, {"x": ["n", 16, 2, 2]}, constants)

    assert list(batch_norms(load_model(graphs.write(tmp_path, built)))) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_threads(tmp_path: Path, threads: int) -> None:
    model = pre_activation(tmp_path)
    arguments = FloatModel(model, threads=1), images(model), rounded(model, AfpFormat(2, 1)), {}

    one, other = restore(*arguments), restore(*arguments, num_threads=threads)

    for name, array in one.biases.items():
        np.testing.assert_array_equal(other.biases[name], array)
    for name, array in one.constants.items():
        np.testing.assert_array_equal(other.constants[name], array)


@pytest.mark.parametrize("name", ["resnet_digits.onnx", "resnet_digits-bn.onnx"])
def test_nearest_rounding_of_a_real_network_gains(name: str) -> None:
    """Folded or live, what BatchNormalization can restore is restored."""
    folder = Path(__file__).resolve().parents[1] / "models"
    model = load_model(folder / name)
    calibration = open_data(folder / "digits_calibration.npz", model.inputs, limit=64)
    evaluation = open_data(folder / "digits_evaluation.npz", model.inputs, limit=64)
    tensors = rounded(model, AfpFormat(2, 0))

    result = restore(FloatModel(model, threads=1), calibration, tensors, {})

    before = error(model, evaluation, Restored(tensors, {}, {}))
    assert error(model, evaluation, result) < before / 3


def test_progress_counts_places(tmp_path: Path) -> None:
    model = pre_activation(tmp_path)
    calls: list[tuple[int, int]] = []

    restore(
        FloatModel(model, threads=1),
        images(model),
        rounded(model, FINE),
        {},
        progress=lambda *args: calls.append(args),
    )

    assert calls == [(n, 5) for n in range(1, 6)]
