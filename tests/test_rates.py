"""Plans by time: rates of formats, the fastest choice that loses little more, and the options."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import afpq
from afpq.calibrate import Stats
from afpq.cli import main
from afpq.data import Data
from afpq.errors import PlanError
from afpq.formats import AfpFormat
from afpq.graph import Model
from afpq.plan import Option, allocate, fastest
from afpq.rates import RATE_FORMATS, RATE_MODES, product_seconds, rates_json, read_rates
from afpq.report import environment
from afpq.search import measure

RATES = dict(zip(RATE_FORMATS, (100.0, 80.0, 50.0, 25.0, 20.0, 10.0), strict=True))


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("e0m1", 100.0),
        ("e2m1", 100.0),
        ("e0m4", 100.0),
        ("e2m2", 80.0),
        ("e0m5", 80.0),
        ("e0m6", 50.0),
        ("e2m4", 25.0),
        ("e0m7", 25.0),
        ("e3m3", 20.0),
        ("e3m4", 20.0),  # beyond all of its class: the last one
        ("e4m2", 10.0),
    ],
)
def test_formats_go_by_their_class_and_largest_integer(text: str, rate: float) -> None:
    assert product_seconds(RATES, AfpFormat.parse(text)) == pytest.approx(1e-9 / rate)


def test_rates_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(rates_json("avx2", {"a8": RATES}))
    assert read_rates(path, "a8") == RATES
    with pytest.raises(PlanError, match=r"no rates of activations 'f32', only of a8"):
        read_rates(path, "f32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a file of rates"),
        ("[]", "not a file of rates: afpq doctor"),
        ('{"rates": {"a8": {"e0m4": 1}}}', "a rate of each of e0m4, e0m5"),
        (rates_json("", {"a8": {**RATES, "e0m5": 0.0}}), "rate of e0m5 is 0.0, not a positive"),
        (rates_json("", {"a8": {**RATES, "e0m5": float("nan")}}), "e0m5 is nan"),
    ],
)
def test_files_that_are_no_rates_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_rates(path, "a8")
    with pytest.raises(PlanError, match="cannot be read"):
        read_rates(tmp_path / "none.json", "a8")


GROUP = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0.01, 4), st.integers(0, 400).map(lambda t: t / 100)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(GROUP, min_size=1, max_size=4), st.floats(0, 1), st.floats(1.0, 2.0))
def test_the_fastest_is_as_fast_as_brute_force(groups: list, share: float, more: float) -> None:
    options = [[Option(bits, loss) for bits, loss, _ in group] for group in groups]
    seconds = [[time for _, _, time in group] for group in groups]
    low, high = (sum(f(o.storage_bits for o in g) for g in options) for f in (min, max))
    budget = low + int(share * (high - low))

    def total(choice: Sequence[int]) -> tuple[int, float, float]:
        picked = [group[j] for group, j in zip(groups, choice, strict=True)]
        return sum(p[0] for p in picked), sum(p[1] for p in picked), sum(p[2] for p in picked)

    start = allocate(options, budget)
    most = more * total(start)[1]
    found = total(fastest(options, seconds, start, budget, most))
    assert found[0] <= budget and found[1] <= most * (1 + 1e-12)
    every = map(total, itertools.product(*(range(len(g)) for g in groups)))
    fits = [t for bits, loss, t in every if bits <= budget and loss <= most * (1 - 1e-5)]
    best = min(fits, default=total(start)[2])
    assert found[2] <= best + 3e-3 * total(start)[2]


def test_a_search_takes_faster_formats_for_a_tenth_of_the_loss(
    lenet_model: Model, lenet_data: Data, lenet_stats: Stats
) -> None:
    costs = measure(lenet_model, lenet_stats, data=lenet_data, mode="quick", rates=RATES)
    plain = measure(lenet_model, lenet_stats, data=lenet_data, mode="quick")
    limit = plain.budget_bits(6, None)
    fast, best = costs.choose(limit), plain.choose(limit)
    assert costs.seconds is not None

    def time(choice: dict[str, int]) -> float:
        return sum(costs.seconds[name][j] for name, j in choice.items())

    assert time(fast) < 0.9 * time(best)
    assert plain.predicted(best) < plain.predicted(fast) <= 1.1 * plain.predicted(best)
    assert sum(costs.found[name][j].storage_bits for name, j in fast.items()) <= limit
    assert costs.frontier == plain.frontier


@pytest.mark.parametrize(("activations", "most"), [("a16", 64), ("a8", 16)])
def test_time_counts_products_of_all_positions(
    lenet_model: Model, lenet_stats: Stats, activations: str, most: int
) -> None:
    costs = measure(lenet_model, lenet_stats, rates=RATES, activations=activations)
    assert costs.seconds is not None
    for layer in lenet_model.layers:
        positions = lenet_stats[layer.name].count / lenet_stats.num_samples
        rate = product_seconds(RATES, costs.found[layer.weight_name][0].format)
        planar = layer.conv is not None and layer.k * layer.groups <= most  # of one layer: 25
        expected = 0.0 if planar else layer.weight.size * positions * rate
        assert costs.seconds[layer.weight_name][0] == pytest.approx(expected)
    with pytest.raises(PlanError, match="rates need calibration data"):
        measure(lenet_model, rates=RATES)
    with pytest.raises(PlanError, match="no rates of activations 'f32', only of a8, a16"):
        measure(lenet_model, lenet_stats, rates=RATES, activations="f32")


def test_doctor_writes_rates_that_quantize_takes(
    lenet: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rates.json"
    assert main(["doctor", "--measure", "--save-rates", str(path)]) == 0
    stored = json.loads(path.read_text())
    assert stored["isa"] == environment()["isa"]
    assert set(stored["rates"]) == set(RATE_MODES)
    command = ["quantize", str(lenet), "-o", str(tmp_path / "o.onnx"), "--mode", "quick"]
    command += ["--calib", str(calibration), "--latency", str(path)]
    assert main([*command, "--activations", "a8"]) == 0
    capsys.readouterr()
    for more, message in [
        (["--activations", "f32", "--force"], "no rates of activations 'f32'"),
        (["--dry-run"], "--dry-run measures nothing"),
        (["--plan", "p.json"], "--latency chooses formats"),
    ]:
        assert main([*command, *more]) != 0
        assert message in capsys.readouterr().err
    assert main(["doctor", "--save-rates", str(path)]) != 0
    assert "--save-rates needs --measure" in capsys.readouterr().err


def test_latency_needs_data(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(rates_json("avx2", {"a16": RATES}))
    with pytest.raises(PlanError, match=r"latency chooses formats .* it needs data"):
        afpq.quantize(models / "lenet5_digits.onnx", latency=path)
    x = np.load(models / "digits_calibration.npz")["input"]
    plan = afpq.search(models / "lenet5_digits.onnx", bits=4)
    with pytest.raises(PlanError, match="a plan already has the formats"):
        afpq.quantize(models / "lenet5_digits.onnx", plan, data={"input": x}, latency=path)
