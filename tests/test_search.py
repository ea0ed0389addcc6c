"""The choice of formats under one budget, in one pass and in two."""

import math
from pathlib import Path

import numpy as np
import pytest

from afpq import _second
from afpq.calibrate import Stats, calibrate
from afpq.data import Data, open_data
from afpq.errors import PlanError
from afpq.formats import AfpFormat, fake_quantize
from afpq.graph import Model, load_model
from afpq.plan import Plan
from afpq.rounding import best_scale
from afpq.runtime import FloatModel
from afpq.search import (
    Costs,
    Judge,
    candidates,
    measure,
    quantized_values,
    search,
    targets,
)

RNG = np.random.default_rng(0)
MODELS = Path(__file__).resolve().parents[1] / "models"


# Second pass


def test_the_ratio_is_of_the_changes_between_extremes() -> None:
    """Predicted to change by 3, changes by 0.6 at two units of loss per error: two fifths as much."""
    assert _second._ratio([2.0, 1.0, 4.0], [0.5, 0.4, 1.0], 2.0) == pytest.approx(0.4)
    assert _second._ratio([2.0], [0.5], 2.0) == 1
    assert _second._ratio([2.0, 4.0], [0.5, 0.1], 2.0) == 0.1
    assert _second._ratio([2.0, 2.1], [0.5, 9.0], 2.0) == 10


def test_moves_are_one_width_down_and_one_up(lenet_model: Model, lenet_stats: Stats) -> None:
    found = {t.weight_name: candidates(t) for t in targets(lenet_model.layers, lenet_stats)}
    losses = {name: [c.noise for c in choices] for name, choices in found.items()}
    costs = Costs(tuple(targets(lenet_model.layers, lenet_stats)), found, losses, "output_error")
    for name, choices in found.items():
        for j, c in enumerate(choices):
            moves = [choices[m].format.bits for m in _second._moves(costs, name, j)]
            expected = [b for b in (c.format.bits - 1, c.format.bits + 1) if 2 <= b <= 8]
            assert moves == expected


@pytest.mark.parametrize("bits", [2.4, 3.0])
def test_a_second_choice_is_no_worse_where_it_is_judged(
    lenet_model: Model, lenet_data: Data, lenet_stats: Stats, bits: float
) -> None:
    costs = measure(lenet_model, lenet_stats, data=lenet_data)
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
    lenet_model: Model, lenet_data: Data, lenet_stats: Stats
) -> None:
    one, three = (
        search(lenet_model, lenet_stats, bits=2.5, data=lenet_data, mode="best", threads=t)
        for t in (1, 3)
    )
    assert one.to_json() == three.to_json()
    assert one.bits_per_weight <= 2.5 == one.budget


def test_a_second_pass_moves_what_is_not_compensated_too(tied: Model) -> None:
    data = open_data({"ids": RNG.integers(0, 50, (24, 7))}, tied.inputs)
    plan = search(tied, calibrate(tied, data), bits=6.5, data=data, mode="best")
    assert plan.bits_per_weight <= 6.5 and plan.predicted_loss is not None


# Search


def test_search_keeps_the_budget_and_minimises_the_measured_loss(
    lenet_model: Model, lenet_data: Data, lenet_stats: Stats
) -> None:
    plan = search(lenet_model, lenet_stats, bits=4.0, data=lenet_data, mode="quick")

    assert plan.objective == "kl"
    assert plan.budget == 4.0
    assert 3.5 < plan.bits_per_weight <= 4.0
    assert [e.layers for e in plan.entries] == [(layer.name,) for layer in lenet_model.layers]
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    # Everything at 4 bits is larger than this plan, and still worse.
    judge = Judge(FloatModel(lenet_model, threads=1), lenet_data)
    found = {t.weight_name: t for t in targets(lenet_model.layers, lenet_stats)}
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
    lenet_model: Model, lenet_data: Data, lenet_stats: Stats
) -> None:
    losses = [
        search(lenet_model, lenet_stats, bits=b, data=lenet_data, mode="quick").predicted_loss
        for b in (3.0, 4.0, 6.0)
    ]
    assert losses == sorted(losses, reverse=True)


def test_the_plan_does_not_depend_on_threads(
    lenet_model: Model, lenet_data: Data, lenet_stats: Stats
) -> None:
    one, three = (
        search(lenet_model, lenet_stats, bits=4.5, data=lenet_data, mode="quick", threads=t)
        for t in (1, 3)
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


def test_size_is_a_budget_in_bytes(lenet_model: Model) -> None:
    plan = search(lenet_model, size=30_000)
    assert sum(e.storage_bits for e in plan.entries) <= 8 * 30_000
    assert sum(e.storage_bits for e in plan.entries) > 8 * 28_000


def test_the_default_budget_is_five_bits(lenet_model: Model) -> None:
    assert search(lenet_model).budget == 5.0


def test_integer_scales_everywhere_when_asked(lenet_model: Model) -> None:
    assert {e.kind for e in search(lenet_model, kind="integer").entries} == {"integer"}


def test_patterns_pin_exclude_and_include(lenet_model: Model) -> None:
    plan = search(
        lenet_model, bits=6.0, exclude=["/0/*"], overrides={"/*/Gemm": "e2m1", "/11/Gemm": "float"}
    )
    formats = {e.layers[0]: e.format for e in plan.entries}
    assert formats["/0/Conv"] is None and formats["/11/Gemm"] is None
    assert formats["/7/Gemm"] == formats["/9/Gemm"] == AfpFormat(2, 1)
    assert formats["/3/Conv"] is not None
    assert plan.bits_per_weight <= 6.0

    only = search(lenet_model, include=["/7/Gemm"])
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
def test_bad_options_are_named(lenet_model: Model, options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        search(lenet_model, **options)


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
