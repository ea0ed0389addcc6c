import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from afpq import _second
from afpq._measure import _steadied as steadied
from afpq.calibrate import Stats, TensorStats, calibrate
from afpq.data import Data, open_data
from afpq.errors import PlanError
from afpq.formats import AfpFormat, all_formats, fake_quantize
from afpq.graph import Model, load_model
from afpq.plan import Plan, storage_bits
from afpq.rounding import best_scale
from afpq.runtime import FloatModel
from afpq.search import (
    DEFAULT_FORMATS,
    Costs,
    Judge,
    Objective,
    Sensitivity,
    candidates,
    choose_objective,
    measure,
    measure_sensitivity,
    quantized_values,
    search,
    targets,
)

RNG = np.random.default_rng(0)
MODELS = Path(__file__).resolve().parents[1] / "models"


@pytest.fixture(scope="module")
def lenet() -> Model:
    return load_model(MODELS / "lenet5_digits.onnx")


@pytest.fixture(scope="module")
def digits(lenet: Model) -> Data:
    return open_data(MODELS / "digits_calibration.npz", lenet.inputs)


@pytest.fixture(scope="module")
def lenet_stats(lenet: Model, digits: Data) -> Stats:
    return calibrate(lenet, digits)


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


@pytest.fixture
def tied(tmp_path: Path) -> Model:
    """A language model in one line: an embedding table that is the output matrix too."""
    table = RNG.standard_normal((50, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
        helper.make_node("Tanh", ["x"], ["h"]),
        helper.make_node("Transpose", ["table"], ["table_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "table_t"], ["logits"], "head"),
    ]
    return save(
        tmp_path / "tied.onnx",
        nodes,
        [tensor("ids", ["B", "S"], TensorProto.INT64)],
        [tensor("logits", ["B", "S", 50])],
        {"table": table},
    )


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
    lenet: Model, lenet_stats: Stats
) -> None:
    target = targets(lenet.layers, lenet_stats)[2]
    choices = [c for c in candidates(target) if c.format == AfpFormat(2, 1)]

    assert [(c.kind, c.granularity) for c in choices] == [("real", "per_channel")]
    assert choices[0].storage_bits == storage_bits(120, 400, AfpFormat(2, 1), "real", "per_channel")
    values = quantized_values(target, choices[0])
    difference = values.astype(np.float64) - target.weight
    np.testing.assert_allclose(choices[0].error, (difference**2 * target.energy).sum(), rtol=1e-5)
    scale, _ = best_scale(target.weight, AfpFormat(2, 1), target.energy)
    expected = fake_quantize(target.weight, AfpFormat(2, 1), scale[:, None])
    np.testing.assert_array_equal(values, expected)


def test_noise_falls_with_the_width(lenet: Model, lenet_stats: Stats) -> None:
    for target in targets(lenet.layers, lenet_stats):
        best: dict[int, float] = {}
        for c in candidates(target):
            best[c.format.bits] = min(c.noise, best.get(c.format.bits, math.inf))
        noises = [best[b] for b in sorted(best)]
        assert noises == sorted(noises, reverse=True)
        assert noises[-1] < 1e-4 < noises[0]


def test_small_layers_may_save_on_scales(lenet: Model) -> None:
    first = targets(lenet.layers, None)[0]  # [6, 25]
    kinds = {(c.kind, c.granularity) for c in candidates(first)}
    assert kinds == {("real", "per_channel"), ("integer", "per_channel"), ("real", "per_tensor")}
    kinds = {(c.kind, c.granularity) for c in candidates(first, kind="integer")}
    assert kinds <= {("integer", "per_channel"), ("integer", "per_tensor")}


def test_a_slower_format_has_to_be_clearly_better(lenet: Model) -> None:
    for target in targets(lenet.layers, None):
        choices = candidates(target, formats=all_formats())
        for c in choices:
            if c.format.kernel_class == "byte":
                continue
            rivals = [
                o for o in choices
                if o.format.kernel_class == "byte" and o.storage_bits <= c.storage_bits
            ]  # fmt: skip
            assert all(c.noise <= 0.95 * o.noise for o in rivals)


def test_a_single_format_is_kept_whatever_its_class(lenet: Model) -> None:
    target = targets(lenet.layers, None)[3]
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


def test_kl_is_chosen_for_a_classifier(lenet: Model) -> None:
    logits = RNG.standard_normal((4, 10)).astype(np.float32)
    exp = np.exp(logits)
    probabilities = exp / exp.sum(1, keepdims=True)
    assert choose_objective(lenet, [[logits]], "auto") == Objective("kl", (0,), False)
    assert choose_objective(lenet, [[probabilities]], "auto") == Objective("kl", (0,), True)
    assert choose_objective(lenet, [[logits[:, :, None, None]]], "auto").name == "kl"


def test_squared_error_is_chosen_for_anything_else(lenet: Model) -> None:
    image = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    column = image[:, 0, 0, :1]
    ids = np.ones((2, 3), np.int64)
    assert choose_objective(lenet, [[image]], "auto") == Objective("squared_error", (0,))
    assert choose_objective(lenet, [[column]], "auto").name == "squared_error"
    assert choose_objective(lenet, [[ids, image, column]], "auto").outputs == (1, 2)
    assert choose_objective(lenet, [[column]], "squared_error").name == "squared_error"
    with pytest.raises(PlanError, match=r"objective 'kl' needs one float output"):
        choose_objective(lenet, [[image]], "kl")
    with pytest.raises(PlanError, match="no output is a float tensor"):
        choose_objective(lenet, [[ids]], "auto")


def test_a_language_model_is_known_by_its_vocabulary(tied: Model) -> None:
    logits = RNG.standard_normal((2, 5, 50)).astype(np.float32)
    hidden = RNG.standard_normal((2, 5, 16)).astype(np.float32)
    assert choose_objective(tied, [[hidden, logits]], "auto") == Objective("kl", (1,))
    assert choose_objective(tied, [[hidden]], "auto").name == "squared_error"


def test_the_judge_measures_kl_by_its_definition(lenet: Model, digits: Data) -> None:
    judge = Judge(FloatModel(lenet, threads=1), digits, max_samples=40)
    layer = lenet.layers[2]
    weights = {layer.weight_name: layer.weight * np.float32(0.9)}

    loss = judge.loss(weights)

    assert judge.num_samples == 40
    assert judge.loss({}) == 0
    runs = [FloatModel(lenet, threads=1).simulate(w) for w in ({}, weights)]
    total = 0.0
    for feeds in digits.take(40).batches(16):
        p, q = (np.exp(r.run(feeds)[0].astype(np.float64)) for r in runs)
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        total += (p * np.log(p / q)).sum()
    assert loss == pytest.approx(total / 40, rel=1e-6)


def test_a_network_that_overflows_is_the_worst(lenet: Model, digits: Data) -> None:
    judge = Judge(FloatModel(lenet, threads=1), digits, max_samples=8)
    layer = lenet.layers[2]
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
    lenet: Model, digits: Data, lenet_stats: Stats
) -> None:
    active = targets(lenet.layers, lenet_stats)
    found = {t.weight_name: candidates(t) for t in active}
    judge = Judge(FloatModel(lenet, threads=1), digits)

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


def test_a_judge_measures_the_squared_error_beside_the_loss(lenet: Model, digits: Data) -> None:
    judge = Judge(FloatModel(lenet, threads=1), digits, max_samples=16)
    squared = Judge(FloatModel(lenet, threads=1), digits, objective="squared_error", max_samples=16)
    layer = lenet.layers[1]
    weights = {layer.weight_name: np.round(layer.weight * 8) / 8}

    assert judge.losses(weights) == (judge.loss(weights), squared.loss(weights))


def test_two_bits_are_measured_not_extrapolated(
    lenet: Model, digits: Data, lenet_stats: Stats
) -> None:
    costs = measure(lenet, lenet_stats, data=digits)
    assert costs.shop is not None
    for target in costs.active:
        choices = costs.found[target.weight_name]
        narrow = [j for j, c in enumerate(choices) if c.format == AfpFormat(0, 1)]
        values = quantized_values(target, choices[narrow[0]])
        nearest = costs.shop.judge.loss({target.weight_name: values})
        # Compensated rounding makes up for a good part, never for more than all of it.
        assert 0 < costs.losses[target.weight_name][narrow[0]] < nearest


# Second pass


def test_the_ratio_is_of_the_changes_between_extremes() -> None:
    """Predicted to change by 3, changes by 0.6 at two units of loss per error: two fifths as much."""
    assert _second._ratio([2.0, 1.0, 4.0], [0.5, 0.4, 1.0], 2.0) == pytest.approx(0.4)
    assert _second._ratio([2.0], [0.5], 2.0) == 1
    assert _second._ratio([2.0, 4.0], [0.5, 0.1], 2.0) == 0.1
    assert _second._ratio([2.0, 2.1], [0.5, 9.0], 2.0) == 10


def test_moves_are_one_width_down_and_one_up(lenet: Model, lenet_stats: Stats) -> None:
    found = {t.weight_name: candidates(t) for t in targets(lenet.layers, lenet_stats)}
    losses = {name: [c.noise for c in choices] for name, choices in found.items()}
    costs = Costs(tuple(targets(lenet.layers, lenet_stats)), found, losses, "output_error")
    for name, choices in found.items():
        for j, c in enumerate(choices):
            moves = [choices[m].format.bits for m in _second._moves(costs, name, j)]
            expected = [b for b in (c.format.bits - 1, c.format.bits + 1) if 2 <= b <= 8]
            assert moves == expected


@pytest.mark.parametrize("bits", [2.4, 3.0])
def test_a_second_choice_is_no_worse_where_it_is_judged(
    lenet: Model, digits: Data, lenet_stats: Stats, bits: float
) -> None:
    costs = measure(lenet, lenet_stats, data=digits)
    limit = costs.budget_bits(bits, None)
    assert costs.shop is not None

    corrected, choice = _second.second_pass(costs, limit)

    def judged(chosen: dict[str, int]) -> tuple[float, float]:
        parts = _second._build(costs.shop, costs, {n: [j] for n, j in chosen.items()}, "")
        network = _second._joined([p[0] for p in parts.values()])
        return costs.shop.judge.losses(network.weights, network.biases)

    first, second = judged(costs.choose(limit)), judged(choice)
    assert math.prod(second) <= math.prod(first)
    assert corrected.predicted(choice) == pytest.approx(second[0])
    assert sum(costs.found[n][j].storage_bits for n, j in choice.items()) <= limit


def test_the_best_plan_does_not_depend_on_threads(
    lenet: Model, digits: Data, lenet_stats: Stats
) -> None:
    one, three = (
        search(lenet, lenet_stats, bits=2.5, data=digits, mode="best", threads=t) for t in (1, 3)
    )
    assert one.to_json() == three.to_json()
    assert one.bits_per_weight <= 2.5 == one.budget


def test_a_second_pass_moves_what_is_not_compensated_too(tied: Model) -> None:
    data = open_data({"ids": RNG.integers(0, 50, (24, 7))}, tied.inputs)
    plan = search(tied, calibrate(tied, data), bits=6.5, data=data, mode="best")
    assert plan.bits_per_weight <= 6.5 and plan.predicted_loss is not None


# Search


def test_search_keeps_the_budget_and_minimises_the_measured_loss(
    lenet: Model, digits: Data, lenet_stats: Stats
) -> None:
    plan = search(lenet, lenet_stats, bits=4.0, data=digits, mode="quick")

    assert plan.objective == "kl"
    assert plan.budget == 4.0
    assert 3.5 < plan.bits_per_weight <= 4.0
    assert [e.layers for e in plan.entries] == [(layer.name,) for layer in lenet.layers]
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    # Everything at 4 bits is larger than this plan, and still worse.
    judge = Judge(FloatModel(lenet, threads=1), digits)
    found = {t.weight_name: t for t in targets(lenet.layers, lenet_stats)}
    chosen = {
        e.weight_name: quantized_values(found[e.weight_name], c)
        for e in plan.entries
        for c in candidates(found[e.weight_name])
        if (c.format, c.kind, c.granularity) == (e.format, e.kind, e.granularity)
    }
    uniform = {}
    for name, t in found.items():
        scale, _ = best_scale(t.weight, AfpFormat(0, 3), t.energy)
        uniform[name] = fake_quantize(t.weight, AfpFormat(0, 3), scale[:, None])
    assert len(chosen) == 5
    assert judge.loss(chosen) < judge.loss(uniform)
    assert plan.predicted_loss is not None
    assert plan.predicted_loss == pytest.approx(judge.loss(chosen), rel=2)


def test_the_frontier_falls_and_passes_through_the_plans_of_its_budgets(
    lenet: Model, lenet_stats: Stats
) -> None:
    plan = search(lenet, lenet_stats, bits=5)

    bits, losses = zip(*plan.frontier)
    assert len(bits) >= 8 and list(bits) == sorted(set(bits))
    assert list(losses) == sorted(losses, reverse=True)
    again = search(lenet, lenet_stats, bits=bits[4] + 1e-6)
    assert again.bits_per_weight == pytest.approx(bits[4])
    assert again.predicted_loss == pytest.approx(losses[4])


def test_a_larger_budget_never_predicts_a_larger_loss(
    lenet: Model, digits: Data, lenet_stats: Stats
) -> None:
    losses = [
        search(lenet, lenet_stats, bits=b, data=digits, mode="quick").predicted_loss
        for b in (3.0, 4.0, 6.0)
    ]
    assert losses == sorted(losses, reverse=True)


def test_the_plan_does_not_depend_on_threads(
    lenet: Model, digits: Data, lenet_stats: Stats
) -> None:
    one, three = (
        search(lenet, lenet_stats, bits=4.5, data=digits, mode="quick", threads=t) for t in (1, 3)
    )
    assert one.to_json() == three.to_json()


@pytest.mark.parametrize("with_stats, objective", [(False, "weight_error"), (True, "output_error")])
def test_without_data_the_plan_says_what_it_rests_on(
    lenet_stats: Stats, with_stats: bool, objective: str
) -> None:
    path = MODELS / "lenet5_digits.onnx"

    plan = search(path, lenet_stats if with_stats else None, bits=4.5)

    assert plan.objective == objective
    assert plan.bits_per_weight <= 4.5
    assert len({e.format for e in plan.entries}) > 1


def test_size_is_a_budget_in_bytes(lenet: Model) -> None:
    plan = search(lenet, size=30_000)
    assert sum(e.storage_bits for e in plan.entries) <= 8 * 30_000
    assert sum(e.storage_bits for e in plan.entries) > 8 * 28_000


def test_the_default_budget_is_five_bits(lenet: Model) -> None:
    assert search(lenet).budget == 5.0


def test_integer_scales_everywhere_when_asked(lenet: Model) -> None:
    assert {e.kind for e in search(lenet, kind="integer").entries} == {"integer"}


def test_patterns_pin_exclude_and_include(lenet: Model) -> None:
    plan = search(
        lenet, bits=6.0, exclude=["/0/*"], overrides={"/*/Gemm": "e2m1", "/11/Gemm": "float"}
    )
    formats = {e.layers[0]: e.format for e in plan.entries}
    assert formats["/0/Conv"] is None and formats["/11/Gemm"] is None
    assert formats["/7/Gemm"] == formats["/9/Gemm"] == AfpFormat(2, 1)
    assert formats["/3/Conv"] is not None
    assert plan.bits_per_weight <= 6.0

    only = search(lenet, include=["/7/Gemm"])
    assert [e.format is None for e in only.entries] == [True, True, False, True, True]


def test_a_layer_that_stays_float_keeps_its_tensor_float(tied: Model) -> None:
    plan = search(tied, exclude=["head"])
    assert [(e.layers, e.format) for e in plan.entries] == [(("embed", "head"), None)]
    assert plan.objective == "none"


def test_a_tied_language_model_is_searched_by_kl(tied: Model) -> None:
    data = open_data({"ids": RNG.integers(0, 50, (12, 7))}, tied.inputs)
    plan = search(tied, calibrate(tied, data), bits=6.5, data=data, mode="quick")
    assert plan.objective == "kl"
    assert plan.bits_per_weight <= 6.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 1.5}, r"budget of 1.5 bits per weight is impossible: the 5 .* at least 2\.\d"),
        ({"size": 1000}, r"size of 1000 bytes is impossible: the 5 .* at least \d+ bytes"),
        ({"bits": 4, "size": 9}, "either bits or size"),
        ({"bits": 0}, "not a positive number"),
        ({"bits": math.nan}, "not a positive number"),
        ({"size": 0}, "not positive"),
        ({"kind": "exact"}, "'exact' is not one of real, integer"),
        ({"mode": "slow"}, "mode 'slow' is not one of quick, default, best"),
        ({"objective": "mse"}, "objective 'mse' is not one of auto, kl, squared_error"),
        ({"formats": []}, "list of formats is empty"),
        ({"include": ["conv*"]}, r"--include 'conv\*' matches no layer; nearest: "),
        ({"exclude": ["/9/Gem"]}, "--exclude '/9/Gem' matches no layer; nearest: /9/Gemm"),
        ({"overrides": {"/1/*": "e2m1"}}, r"--layer '/1/\*' matches no layer"),
        ({"overrides": {"/9/*": "e8m1"}}, r"--layer '/9/\*': exponent_bits 8"),
        (
            {"exclude": ["/9/*"], "overrides": {"/*/Gemm": "e2m1"}},
            r"--layer '/\*/Gemm': layer '/9/Gemm' is excluded as well",
        ),
    ],
)
def test_bad_options_are_named(lenet: Model, options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        search(lenet, **options)


@pytest.mark.slow
def test_mobilenet_keeps_its_predictions_at_five_bits(shared: Path) -> None:
    from PIL import Image

    model = load_model(shared / "models/imagenet/mobilenetv2_tv.onnx")

    def images(part: str, count: int) -> Data:
        files = sorted((shared / "data/imagenet" / part).glob("*.jpg"))[:count]
        x = np.stack([np.asarray(Image.open(f).convert("RGB"), np.float32) for f in files]) / 255
        x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return open_data(
            {model.inputs[0].name: x.transpose(0, 3, 1, 2).astype(np.float32)}, model.inputs
        )

    data, evaluation = images("calibration", 64), images("evaluation", 64)
    stats = calibrate(model, data)

    plan = search(model, stats, bits=5.0, data=data, mode="quick")

    found = {t.weight_name: t for t in targets(model.layers, stats)}
    values = {}
    for e in plan.entries:
        assert e.format is not None
        t = found[e.weight_name]
        scale, _ = best_scale(t.weight, e.format, t.energy, kind=e.kind, granularity=e.granularity)
        values[e.weight_name] = fake_quantize(t.weight, e.format, scale[:, None])
    judge = Judge(FloatModel(model, threads=1), evaluation)
    assert plan.bits_per_weight <= 5.0
    assert judge.loss(values) < 0.05
