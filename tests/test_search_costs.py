"""What a format costs a layer: candidates, the loss at the outputs, sensitivities."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from afpq._measure import _steadied as steadied
from afpq.calibrate import Stats, TensorStats
from afpq.data import Data
from afpq.errors import PlanError
from afpq.formats import AfpFormat, all_formats, fake_quantize
from afpq.graph import Model, load_model
from afpq.plan import storage_bits
from afpq.rounding import best_scale
from afpq.runtime import FloatModel
from afpq.search import (
    DEFAULT_FORMATS,
    Judge,
    Objective,
    Sensitivity,
    candidates,
    choose_objective,
    measure,
    measure_sensitivity,
    quantized_values,
    targets,
)

RNG = np.random.default_rng(0)


def save(path: Path, nodes: list, inputs: list, outputs: list, weights: dict) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        outputs,
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return load_model(path)


def tensor(name: str, shape: list, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def stats_of(moments: dict[str, np.ndarray]) -> Stats:
    layers = {
        name: TensorStats(9, np.zeros_like(m), m, 0, 1, np.zeros(64, np.int64))
        for name, m in moments.items()
    }
    return Stats(layers, 9, "")


# Candidates


def test_default_formats_hold_every_distinct_value_set() -> None:
    assert AfpFormat(1, 2) not in DEFAULT_FORMATS
    assert AfpFormat(0, 3) in DEFAULT_FORMATS and AfpFormat(2, 1) in DEFAULT_FORMATS
    assert {f.bits for f in DEFAULT_FORMATS} == set(range(2, 9))


def test_a_candidate_has_the_expected_output_error_and_the_stored_size(
    lenet_model: Model, lenet_stats: Stats
) -> None:
    target = targets(lenet_model.layers, lenet_stats)[2]
    choices = [c for c in candidates(target) if c.format == AfpFormat(2, 1)]

    assert [(c.kind, c.granularity) for c in choices] == [("real", "per_channel")]
    assert choices[0].storage_bits == storage_bits(120, 400, AfpFormat(2, 1), "real", "per_channel")
    values = quantized_values(target, choices[0])
    difference = values.astype(np.float64) - target.weight
    np.testing.assert_allclose(choices[0].error, (difference**2 * target.energy).sum(), rtol=1e-5)
    scale, _ = best_scale(target.weight, AfpFormat(2, 1), target.energy)
    expected = fake_quantize(target.weight, AfpFormat(2, 1), scale[:, None])
    np.testing.assert_array_equal(values, expected)


def test_noise_falls_with_the_width(lenet_model: Model, lenet_stats: Stats) -> None:
    for target in targets(lenet_model.layers, lenet_stats):
        best: dict[int, float] = {}
        for c in candidates(target):
            best[c.format.bits] = min(c.noise, best.get(c.format.bits, math.inf))
        noises = [best[b] for b in sorted(best)]
        assert noises == sorted(noises, reverse=True)
        assert noises[-1] < 1e-4 < noises[0]


def test_small_layers_may_save_on_scales(lenet_model: Model) -> None:
    first = targets(lenet_model.layers, None)[0]  # [6, 25]
    kinds = {(c.kind, c.granularity) for c in candidates(first)}
    assert kinds == {("real", "per_channel"), ("integer", "per_channel"), ("real", "per_tensor")}
    kinds = {(c.kind, c.granularity) for c in candidates(first, kind="integer")}
    assert kinds <= {("integer", "per_channel"), ("integer", "per_tensor")}


def test_a_slower_format_has_to_be_clearly_better(lenet_model: Model) -> None:
    for target in targets(lenet_model.layers, None):
        choices = candidates(target, formats=all_formats())
        for c in choices:
            if c.format.kernel_class == "byte":
                continue
            rivals = [
                o for o in choices
                if o.format.kernel_class == "byte" and o.storage_bits <= c.storage_bits
            ]  # fmt: skip
            assert all(c.noise <= 0.95 * o.noise for o in rivals)


def test_a_single_format_is_kept_whatever_its_class(lenet_model: Model) -> None:
    target = targets(lenet_model.layers, None)[3]
    assert {c.format for c in candidates(target, formats=[AfpFormat(5, 2)])} == {AfpFormat(5, 2)}


def test_groups_weigh_their_own_channels(tmp_path: Path) -> None:
    weight = np.ones((64, 1, 1, 9), np.float32)
    model = save(
        tmp_path / "m.onnx",
        [helper.make_node("Conv", ["x", "w"], ["y"], "dw", group=2, kernel_shape=[1, 9])],
        [tensor("x", ["N", 2, 1, 20])],
        [tensor("y", ["N", 64, 1, 12])],
        {"w": weight},
    )
    moments = np.repeat([[1.0], [4.0]], 9, axis=1)

    target = targets(model.layers, stats_of({"dw": moments}))[0]

    np.testing.assert_allclose(target.signal, np.repeat([9, 36], 32) * 1.01)


def test_tied_layers_are_one_target_with_both_energies(tied: Model) -> None:
    found = targets(tied.layers, stats_of({"head": np.arange(1.0, 17)[None]}))

    assert [t.names for t in found] == [("embed", "head")]
    assert found[0].energy is not None
    # The table counts every column alike, the product by its energy; each in all as much as the other.
    slopes = np.diff(found[0].energy[0])
    assert (slopes > 0).all()
    np.testing.assert_allclose(found[0].signal.sum(), 2, rtol=1e-6)


# Loss


def test_kl_is_chosen_for_a_classifier(lenet_model: Model) -> None:
    logits = RNG.standard_normal((4, 10)).astype(np.float32)
    exp = np.exp(logits)
    probabilities = exp / exp.sum(1, keepdims=True)
    assert choose_objective(lenet_model, [[logits]], "auto") == Objective("kl", (0,), False)
    assert choose_objective(lenet_model, [[probabilities]], "auto") == Objective("kl", (0,), True)
    assert choose_objective(lenet_model, [[logits[:, :, None, None]]], "auto").name == "kl"


def test_squared_error_is_chosen_for_anything_else(lenet_model: Model) -> None:
    image = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    column = image[:, 0, 0, :1]
    ids = np.ones((2, 3), np.int64)
    assert choose_objective(lenet_model, [[image]], "auto") == Objective("squared_error", (0,))
    assert choose_objective(lenet_model, [[column]], "auto").name == "squared_error"
    assert choose_objective(lenet_model, [[ids, image, column]], "auto").outputs == (1, 2)
    assert choose_objective(lenet_model, [[column]], "squared_error").name == "squared_error"
    with pytest.raises(PlanError, match=r"objective 'kl' needs one float output"):
        choose_objective(lenet_model, [[image]], "kl")
    with pytest.raises(PlanError, match="no output is a float tensor"):
        choose_objective(lenet_model, [[ids]], "auto")
    with pytest.raises(PlanError, match="objective 'mse' is not one of auto, kl, squared_error"):
        choose_objective(lenet_model, [[image]], "mse")


def test_a_language_model_is_known_by_its_vocabulary(tied: Model) -> None:
    logits = RNG.standard_normal((2, 5, 50)).astype(np.float32)
    hidden = RNG.standard_normal((2, 5, 16)).astype(np.float32)
    assert choose_objective(tied, [[hidden, logits]], "auto") == Objective("kl", (1,))
    assert choose_objective(tied, [[hidden]], "auto").name == "squared_error"


def test_the_judge_measures_kl_by_its_definition(lenet_model: Model, lenet_data: Data) -> None:
    judge = Judge(FloatModel(lenet_model, threads=1), lenet_data, max_samples=40)
    layer = lenet_model.layers[2]
    weights = {layer.weight_name: layer.weight * np.float32(0.9)}

    loss = judge.loss(weights)

    assert judge.num_samples == 40
    assert judge.loss({}) == 0
    runs = [FloatModel(lenet_model, threads=1).simulate(w) for w in ({}, weights)]
    total = 0.0
    for feeds in lenet_data.take(40).batches(16):
        p, q = (np.exp(r.run(feeds)[0].astype(np.float64)) for r in runs)
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        total += (p * np.log(p / q)).sum()
    assert loss == pytest.approx(total / 40, rel=1e-6)


def test_a_network_that_overflows_is_the_worst(lenet_model: Model, lenet_data: Data) -> None:
    judge = Judge(FloatModel(lenet_model, threads=1), lenet_data, max_samples=8)
    layer = lenet_model.layers[2]
    assert judge.loss({layer.weight_name: np.full_like(layer.weight, 3e38)}) == 1e6


# Sensitivity


def test_a_sensitivity_goes_through_its_probes_and_rises() -> None:
    s = Sensitivity.fit([(1.0, 2.0), (0.01, 0.001), (0.1, 0.1)])
    assert [s.loss(e) for e in (0.01, 0.1, 1.0)] == pytest.approx([0.001, 0.1, 2.0])
    values = [s.loss(e) for e in np.geomspace(1e-5, 100, 60)]
    assert values == sorted(set(values))


def test_beyond_the_probes_the_slope_is_limited() -> None:
    s = Sensitivity.fit([(0.01, 1e-9), (1.0, 1.0)])  # slope 4.5
    assert s.loss(0.001) == pytest.approx(1e-10)
    assert s.loss(10) == pytest.approx(100)
    flat = Sensitivity.fit([(0.01, 1.0), (1.0, 1.0)])
    assert flat.loss(100) == pytest.approx(100)


def test_a_loss_below_that_of_a_smaller_error_is_noise() -> None:
    s = Sensitivity.fit([(0.01, 0.5), (0.1, 0.2)])
    assert s.losses == (0.5, 0.5)


def test_a_layer_without_error_or_without_probes_costs_nothing() -> None:
    assert Sensitivity.fit([(0.1, 0.2)]).loss(0) == 0
    assert Sensitivity.fit([]).loss(0.3) == 0
    assert Sensitivity.fit([(0.0, 0.0)]).loss(0.3) == 0
    assert 0 < Sensitivity.fit([(0.1, 0.0)]).loss(0.05) < 1e-12


def test_measured_sensitivity_predicts_a_format_between_probes(
    lenet_model: Model, lenet_data: Data, lenet_stats: Stats
) -> None:
    active = targets(lenet_model.layers, lenet_stats)
    found = {t.weight_name: candidates(t) for t in active}
    judge = Judge(FloatModel(lenet_model, threads=1), lenet_data)

    sensitivities = measure_sensitivity(judge, active, found, widths=(3, 5))

    ratios = []
    for target in active:
        choices = [c for c in found[target.weight_name] if c.format == AfpFormat(2, 1)]
        actual = judge.loss({target.weight_name: quantized_values(target, choices[0])})
        ratios.append(sensitivities[target.weight_name].loss(choices[0].noise) / actual)
    assert 0.5 < np.exp(np.mean(np.log(ratios))) < 2
    assert all(0.2 < r < 5 for r in ratios)


def test_losses_are_steadied_by_squared_errors() -> None:
    """A loss four times what its squared error says at the common ratio is halved; equal measures stay."""
    assert steadied([(0.1, 1.0), (0.2, 2.0), (1.2, 3.0)]) == pytest.approx([0.1, 0.2, 0.6])
    assert steadied([(0.3, 0.3), (0.7, 0.7)]) == pytest.approx([0.3, 0.7])
    assert all(np.isfinite(steadied([(0.0, 0.0), (0.1, 0.2), (1e6, 1e6)])))
    assert steadied([]) == []


def test_a_judge_measures_the_squared_error_beside_the_loss(
    lenet_model: Model, lenet_data: Data
) -> None:
    judge = Judge(FloatModel(lenet_model, threads=1), lenet_data, max_samples=16)
    squared = Judge(
        FloatModel(lenet_model, threads=1), lenet_data, objective="squared_error", max_samples=16
    )
    layer = lenet_model.layers[1]
    weights = {layer.weight_name: np.round(layer.weight * 8) / 8}

    assert judge.losses(weights) == (judge.loss(weights), squared.loss(weights))


def test_two_bits_are_measured_not_extrapolated(
    lenet_model: Model, lenet_data: Data, lenet_stats: Stats
) -> None:
    costs = measure(lenet_model, lenet_stats, data=lenet_data)
    assert costs.shop is not None
    for target in costs.active:
        choices = costs.found[target.weight_name]
        narrow = [j for j, c in enumerate(choices) if c.format == AfpFormat(0, 1)]
        values = quantized_values(target, choices[narrow[0]])
        nearest = costs.shop.judge.loss({target.weight_name: values})
        # Compensated rounding makes up for a good part, never for more than all of it.
        assert 0 < costs.losses[target.weight_name][narrow[0]] < nearest
