"""Compensated rounding on problems with known answers, and the walk that feeds it against plain runs of the network."""

import importlib
from itertools import product
from pathlib import Path

import graphs
import numpy as np
import pytest

import afpq._walk as walking
from afpq import _core
from afpq._layer import Layer
from afpq._moments import Moments, MomentSums, input_rows, output_rows
from afpq._walk import groups_of, walk
from afpq.compensate import Choice, compensate, probe, round_layer
from afpq.data import open_data
from afpq.formats import AfpFormat, decode, encode, magnitudes
from afpq.graph import load_model
from afpq.rounding import best_scale, fake_quantize_rows, quantize_tensor
from afpq.runtime import FloatModel

MODULE = importlib.import_module("afpq.compensate")
NETWORKS = ("lenet5_digits.onnx", "resnet_digits.onnx", "resnet_digits-bn.onnx")


def dense(n: int, k: int, groups: int = 1, seed: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    return Layer("layer", "matmul", "MatMul", "w", weight, "x", "y", bias, groups=groups, k_axis=-1)


def moments(layer: Layer, rows: np.ndarray, wanted: np.ndarray | None = None) -> Moments:
    """Of inputs [rows, k], and of wanted outputs [rows, n]."""
    sums = MomentSums((layer,))
    outputs = None if wanted is None else [wanted.astype(np.float32)]
    sums.add(rows.astype(np.float32), outputs, len(rows), 0)
    return sums.moments(wanted is not None)[0]


def correlated(count: int, k: int, seed: int = 1) -> np.ndarray:
    """Inputs that mostly go together, off zero."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((count, 2)) @ rng.standard_normal((2, k))
    return common + 0.1 * rng.standard_normal((count, k)) + 1.0


def output_error(layer: Layer, rows: np.ndarray, values: np.ndarray, bias: np.ndarray) -> float:
    difference = rows @ (values - layer.weight).T + (bias - layer.bias)
    return float(np.square(difference).mean())


def nearest(layer: Layer, choice: Choice, rows: np.ndarray) -> np.ndarray:
    energy = np.square(rows).mean(0)[None]
    scale, _ = best_scale(layer.weight, choice.format, energy, kind=choice.kind)
    return fake_quantize_rows(layer.weight, choice.format, scale)


@pytest.mark.parametrize("text", ["e0m2", "e2m1", "e2m0", "e3m0", "e0m4"])
def test_correlated_inputs_lose_a_fraction_of_nearest_rounding(text: str) -> None:
    layer, rows, choice = dense(24, 32), correlated(4000, 32), Choice(AfpFormat.parse(text))

    rounded = round_layer(layer, moments(layer, rows), choice)

    before = output_error(layer, rows, nearest(layer, choice, rows), layer.bias)
    assert output_error(layer, rows, rounded.values, rounded.bias) < before / 8


@pytest.mark.parametrize("seed", range(4))
def test_rounding_comes_close_to_the_best_codes(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Against all 5^5 choices of a row, at the scale that was found."""
    monkeypatch.setattr(MODULE, "_DAMPING", 0.0)
    layer, rows, fmt = dense(6, 5, seed=seed), correlated(5000, 5, seed), AfpFormat(2, 0)

    rounded = round_layer(layer, moments(layer, rows), Choice(fmt))

    grid = np.unique(np.concatenate([magnitudes(fmt), -magnitudes(fmt)])).astype(float)
    covariance = np.cov(rows.T, bias=True)
    found = best = 0.0
    for row, scale, weight in zip(rounded.values, rounded.scale, layer.weight, strict=True):
        every = np.array(list(product(grid, repeat=5))) * scale - weight
        best += float(np.einsum("ck,kl,cl->c", every, covariance, every).min())
        found += float((row - weight) @ covariance @ (row - weight))
    assert best <= found * (1 + 1e-9)
    assert found < 2.5 * best


@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("text", ["e0m1", "e0m7", "e2m1", "e3m2", "e4m3"])
def test_values_are_numbers_of_the_format(text: str, kind: str) -> None:
    layer, rows, fmt = dense(19, 24), correlated(300, 24), AfpFormat.parse(text)

    rounded = round_layer(layer, moments(layer, rows), Choice(fmt, kind))

    codes = encode(rounded.values, fmt, rounded.scale[:, None])
    np.testing.assert_array_equal(decode(codes, fmt, rounded.scale[:, None]), rounded.values)
    quantize_tensor(rounded.values, fmt, rounded.scale, kind=kind)  # the scales can be stored


def test_independent_inputs_leave_nearest_rounding() -> None:
    layer, fmt = dense(9, 12), AfpFormat(2, 1)
    identity = np.eye(12)[None]
    known = Moments(
        100, np.zeros((1, 12)), identity, layer.bias.astype(float), layer.weight[None] @ identity
    )

    rounded = round_layer(layer, known, Choice(fmt))

    expected = fake_quantize_rows(layer.weight, fmt, rounded.scale)
    np.testing.assert_array_equal(rounded.values, expected)
    np.testing.assert_allclose(rounded.bias, layer.bias, atol=1e-6)


def test_weights_make_up_for_changed_inputs() -> None:
    """The inputs come scaled by 0.8: weights of 8 bits have to grow by 1 / 0.8."""
    layer = dense(8, 6)
    rows = np.random.default_rng(2).standard_normal((5000, 6)) + 0.5
    wanted = rows @ layer.weight.T + layer.bias

    rounded = round_layer(layer, moments(layer, 0.8 * rows, wanted), Choice(AfpFormat(0, 7)))

    # The damping holds a tenth of the way back.
    expected = layer.weight * (0.8 + 0.1 * 0.64) / (0.64 + 0.1 * 0.64)
    np.testing.assert_allclose(rounded.values, expected, atol=0.04)
    got = (0.8 * rows) @ rounded.values.T + rounded.bias
    np.testing.assert_allclose(got.mean(0), wanted.mean(0), atol=1e-4)


def test_the_bias_restores_the_mean_of_every_channel() -> None:
    layer, rows = dense(10, 16), correlated(1000, 16).astype(np.float32)

    rounded = round_layer(layer, moments(layer, rows), Choice(AfpFormat(0, 2)))

    wanted = (rows @ layer.weight.T + layer.bias).mean(0)
    got = (rows @ rounded.values.T + rounded.bias).mean(0)
    np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_inputs_that_never_vary_are_no_obstacle() -> None:
    layer = dense(5, 8)

    rounded = round_layer(layer, moments(layer, np.ones((50, 8))), Choice(AfpFormat(2, 2)))

    assert np.isfinite(rounded.values).all()
    np.testing.assert_allclose(
        rounded.bias + rounded.values.sum(1), layer.bias + layer.weight.sum(1), atol=1e-4
    )


def test_a_layer_that_meets_no_rows_is_rounded_as_it_is() -> None:
    layer = dense(5, 8)

    rounded = round_layer(layer, moments(layer, np.empty((0, 8))), Choice(AfpFormat(0, 7)))

    np.testing.assert_allclose(rounded.values, layer.weight, atol=0.03)


def test_one_scale_serves_all_groups() -> None:
    layer = dense(8, 9, groups=4)
    rows = np.random.default_rng(3).standard_normal((4, 200, 9))
    covariance = np.matmul(rows.transpose(0, 2, 1), rows) / 200
    weight = layer.weight.reshape(4, 2, 9)
    known = Moments(200, np.zeros((4, 9)), covariance, np.zeros(8), weight @ covariance)

    rounded = round_layer(layer, known, Choice(AfpFormat(0, 3), granularity="per_tensor"))

    assert rounded.scale.shape == (1,)
    ratios = rounded.values / rounded.scale
    np.testing.assert_array_equal(ratios, np.round(ratios))


@pytest.mark.parametrize("threads", [2, 5])
def test_rounding_does_not_depend_on_threads(threads: int) -> None:
    layer, rows, choice = dense(40, 20), correlated(500, 20), Choice(AfpFormat(2, 1))

    one = round_layer(layer, moments(layer, rows), choice)
    many = round_layer(layer, moments(layer, rows), choice, num_threads=threads)

    np.testing.assert_array_equal(one.values, many.values)
    np.testing.assert_array_equal(one.scale, many.scale)


def test_shapes_that_do_not_fit_are_refused() -> None:
    ones = np.ones((3, 4), np.float32)
    square = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match=r"moments \[3, 3\] do not fit k = 4"):
        _core.round_compensated(ones, square[:3, :3].copy(), square, "e0m2", "real", ones[:, 0], 0)
    with pytest.raises(ValueError, match="got 2 scales for 3 rows"):
        _core.round_compensated(ones, square, square, "e0m2", "real", np.ones(2, np.float32), 0)


@pytest.mark.parametrize("case", sorted(graphs.CASES))
def test_rows_times_weights_are_what_the_layer_computes(case: str, tmp_path: Path) -> None:
    given = graphs.CASES[case]
    model = load_model(graphs.write(tmp_path, given.model()))
    network = FloatModel(model)
    for group in groups_of(model, model.tensors().keys()):
        layer = group[0]
        assert layer.input_name is not None
        value, output = network.run(given.arrays(), [layer.input_name, layer.output_name])

        rows, picked = input_rows(layer, value, 1 << 30)
        sparse, some = input_rows(layer, value, 7, phase=3)

        weight = layer.weight.reshape(layer.groups, -1, layer.k)
        product = np.einsum("gpk,gnk->pgn", rows, weight).reshape(len(picked), layer.n)
        expected = output_rows(layer, output)[picked] - (0 if layer.bias is None else layer.bias)
        tolerance = 1e-2 if layer.dtype == "float16" else 1e-4
        np.testing.assert_allclose(product, expected, atol=tolerance, rtol=tolerance)
        assert 0 < len(some) <= 8
        np.testing.assert_array_equal(sparse, rows[:, some])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kept_bytes", [0, 1 << 20, 1 << 30])
def test_a_walk_meets_what_the_changed_network_computes(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str, kept_bytes: int
) -> None:
    monkeypatch.setattr(walking, "_KEPT_BYTES", kept_bytes)
    model = load_model(models / name)
    data = open_data(models / "digits_calibration.npz", model.inputs).take(40)
    network = FloatModel(model, threads=1)
    weights, biases = {}, {}
    feeds = next(data.batches(40))
    float_outputs = dict(
        zip(
            [x.name for x in model.layers],
            network.run(feeds, [x.output_name for x in model.layers]),
        )
    )

    groups = groups_of(model, model.tensors().keys())
    for step in walk(network, data, groups, weights=weights, biases=biases, num_threads=2):
        for layer, found in zip(step.layers, step.moments, strict=True):
            name = str(layer.input_name)
            value = feeds[name] if name in feeds else None
            if value is None:
                value = network.simulate(weights, biases, fetch=[name]).run(feeds)[0]
            rows, picked = input_rows(layer, value, 1 << 30)
            wanted = output_rows(layer, float_outputs[layer.name])[picked].mean(0)
            if found.count == len(picked):  # else a sample of them
                np.testing.assert_allclose(found.input_mean, rows.mean(1), atol=1e-4)
                np.testing.assert_allclose(found.output_mean, wanted, rtol=1e-3, atol=1e-3)
                centred = rows - rows.mean(1, keepdims=True)
                covariance = np.matmul(centred.transpose(0, 2, 1), centred) / len(picked)
                np.testing.assert_allclose(found.covariance, covariance, rtol=1e-2, atol=1e-3)
            weights[layer.weight_name] = np.round(layer.weight * 8) / 8
            biases[layer.name] = np.full(layer.n, 0.25, np.float32)
    assert set(weights) == set(model.tensors())


def test_compensation_brings_the_network_closer(models: Path) -> None:
    model = load_model(models / "resnet_digits.onnx")
    calibration = open_data(models / "digits_calibration.npz", model.inputs)
    evaluation = open_data(models / "digits_evaluation.npz", model.inputs)
    network = FloatModel(model, threads=1)
    choices = {name: Choice(AfpFormat(2, 0)) for name in model.tensors()}
    start = {}
    for name, layer in model.tensors().items():
        scale, _ = best_scale(layer.weight, choices[name].format)
        start[name] = quantize_tensor(layer.weight, choices[name].format, scale)

    tensors, biases, sqnr = compensate(network, calibration, choices, start, {})

    feeds = next(evaluation.batches(360))
    reference = network.run(feeds)[0]

    def error(tensors: dict, biases: dict) -> float:
        weights = {name: tensor.decode() for name, tensor in tensors.items()}
        return float(np.square(network.simulate(weights, biases).run(feeds)[0] - reference).mean())

    assert error(tensors, biases) < error(start, {}) / 3
    # The last bias restores the mean of the whole network: it was found with all others in their places.
    seen = next(calibration.batches(128))
    weights = {name: tensor.decode() for name, tensor in tensors.items()}
    found, wanted = network.simulate(weights, biases).run(seen)[0], network.run(seen)[0]
    np.testing.assert_allclose(found.mean(0), wanted.mean(0), atol=1e-4)
    assert set(tensors) == set(sqnr) == set(choices)
    assert set(biases) == {layer.name for layer in model.layers}


def test_probes_are_made_for_every_choice(models: Path) -> None:
    model = load_model(models / "lenet5_digits.onnx")
    data = open_data(models / "digits_calibration.npz", model.inputs).take(24)
    coarse, fine = Choice(AfpFormat(0, 2)), Choice(AfpFormat(2, 4))

    found = probe(FloatModel(model), data, {name: [coarse, fine] for name in model.tensors()})

    assert set(found) == set(model.tensors())
    assert all(a.sqnr_db + 12 < b.sqnr_db for a, b in found.values())


def test_probes_in_the_rounded_network_begin_with_what_compensation_gives(models: Path) -> None:
    model = load_model(models / "lenet5_digits.onnx")
    data = open_data(models / "digits_calibration.npz", model.inputs).take(24)
    network, kept, other = (
        FloatModel(model, threads=1),
        Choice(AfpFormat(2, 1)),
        Choice(AfpFormat(0, 1)),
    )
    start = {}
    for name, layer in model.tensors().items():
        scale, _ = best_scale(layer.weight, kept.format)
        start[name] = quantize_tensor(layer.weight, kept.format, scale)
    tensors, biases, _ = compensate(network, data, dict.fromkeys(start, kept), start, {})

    found = probe(
        network,
        data,
        dict.fromkeys(start, (kept, other)),
        weights={name: tensor.decode() for name, tensor in start.items()},
        biases={},
    )

    for layer in model.layers:
        first, second = found[layer.weight_name]
        np.testing.assert_array_equal(first.values, tensors[layer.weight_name].decode())
        np.testing.assert_array_equal(first.bias, biases[layer.name])
        assert second.sqnr_db < first.sqnr_db


def test_shared_weights_and_long_rows_are_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(graphs.write(tmp_path, graphs.CASES["matmul"].model()))
    assert groups_of(model, model.tensors().keys())
    monkeypatch.setattr(walking, "MAX_K", 1)
    assert not groups_of(model, model.tensors().keys())
