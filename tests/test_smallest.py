"""The drop with its interval, and the smallest model within a limit of it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as distributions

import afpq
from afpq._drop import Drop, drop_of
from afpq._smallest import first_that_passes
from afpq.errors import PlanError
from afpq.evaluate import OutputComparison


def output(name: str = "y", **fields: Any) -> dict[str, Any]:
    return vars(OutputComparison(name=name, kind="logits", **{"num_rows": 100, **fields}))


def drop(**fields: Any) -> Drop:
    found = drop_of([output(**fields)])
    assert found is not None
    return found


# The drop


def test_labels_decide_before_agreement_and_agreement_before_error() -> None:
    assert drop(top1_lost=5, top1_gained=2, agreement=0.5).metric == "top1"
    assert drop(agreement=0.5, relative_error=0.1).metric == "agreement"
    assert drop(relative_error=0.1, relative_error_stderr=0.01).metric == "error"
    assert drop_of([output()]) is None
    assert drop_of([output(agreement=1.0, num_rows=0)]) is None


def test_the_worst_output_counts() -> None:
    found = drop_of([output("a", agreement=0.9), output("b", agreement=0.7), output("c")])
    assert found is not None
    assert found.output == "b" and found.percent == pytest.approx(30)


def test_a_drop_of_top1_is_in_points_and_may_be_negative() -> None:
    assert drop(top1_lost=5, top1_gained=2).percent == 3
    assert drop(top1_lost=0, top1_gained=2).percent == -2


def test_the_interval_of_a_paired_difference() -> None:
    """By hand: (5.5 - 2.5) / 102 -+ 1.96 sqrt(8 - 9 / 102) / 102."""
    found = drop(top1_lost=5, top1_gained=2)
    assert (found.low, found.high) == pytest.approx((-2.4637, 8.3460), abs=1e-4)


@pytest.mark.parametrize("rows", [7, 20, 50, 150, 300, 999])
def test_a_share_of_changed_rows_is_exact(rows: int) -> None:
    """A limit of 2 % admits 1 row of 50: what floats make of 1 - 49 / 50 is a bit more."""
    for changed in range(rows + 1):
        agreement = float(np.mean(np.arange(rows) >= changed))
        assert drop(agreement=agreement, num_rows=rows).percent == 100 * changed / rows


def test_no_change_on_few_rows_is_not_certainty() -> None:
    few, many = (drop(top1_lost=0, top1_gained=0, num_rows=n) for n in (20, 2000))
    assert few.high == -few.low > 8
    assert 0 < many.high < 0.1
    assert drop(agreement=1.0, num_rows=20).high > 15


@pytest.mark.parametrize("changed, rows", [(0, 30), (1, 30), (12, 300), (299, 300), (300, 300)])
def test_the_interval_of_a_share_is_wilsons(changed: int, rows: int) -> None:
    found = drop(agreement=1 - changed / rows, num_rows=rows)
    oracle = distributions.binomtest(changed, rows).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((100 * oracle.low, 100 * oracle.high))


@given(st.integers(1, 500), st.data())
def test_intervals_hold_the_share_they_belong_to(rows: int, data: st.DataObject) -> None:
    found = drop(agreement=data.draw(st.integers(0, rows)) / rows, num_rows=rows)
    assert 0 <= found.low <= found.percent <= found.high
    assert found.high <= 100 + 1e-9


def test_the_interval_of_an_error_is_normal_and_open_for_one_sample() -> None:
    found = drop(relative_error=0.02, relative_error_stderr=0.005)
    assert (found.percent, found.low, found.high) == pytest.approx((2, 1.02, 2.98), abs=1e-3)
    assert drop(relative_error=0.02, relative_error_stderr=None).high == math.inf


def test_the_text_says_what_was_counted() -> None:
    assert drop(top1_lost=5, top1_gained=2).text == (
        "3 points of top-1 lost (95%: -2.46 to 8.35; 100 rows)"
    )
    assert drop(agreement=0.9).text.startswith("10 % of first classes changed (95%: ")


# Bisection


@given(st.integers(-5, 60), st.integers(0, 60), st.integers(-10, 80))
def test_bisection_finds_the_first_that_passes(low: int, length: int, first: int) -> None:
    tried: list[int] = []

    def passes(number: int) -> bool:
        tried.append(number)
        return number >= first

    found = first_that_passes(low, low + length, passes)

    assert found == (None if first > low + length else max(first, low))
    assert len(set(tried)) == len(tried) <= math.ceil(math.log2(length + 2))
    assert found is not None or low + length in tried


# Models


@pytest.fixture(scope="module")
def lenet(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue("models")) / "lenet5_digits.onnx"


@pytest.fixture(scope="module")
def digits(lenet: Path) -> dict[str, Any]:
    with np.load(lenet.parent / "digits_calibration.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize("labels", [True, False])
def test_the_smallest_model_keeps_the_metric(
    lenet: Path, digits: dict[str, Any], labels: bool
) -> None:
    data = digits if labels else {"input": digits["input"]}

    model = afpq.quantize(lenet, data=data, samples=96, max_drop=5, mode="quick")

    goal = model.facts.goal
    assert goal is not None and goal["met"] and model.plan is not None
    assert goal["metric"] == ("top1" if labels else "agreement")
    assert goal["percent"] <= 5 and goal["low"] < goal["high"]
    assert goal["num_rows"] == 24
    passed = [t["bits_per_weight"] for t in goal["trials"] if t["met"]]
    assert model.plan.bits_per_weight == min(passed)
    failed = [t["bits_per_weight"] for t in goal["trials"] if not t["met"]]
    assert not failed or max(failed) < min(passed)


def test_sensitivities_are_measured_once(lenet: Path, digits: dict[str, Any]) -> None:
    stages: dict[str, int] = {}

    def count(stage: str, done: int, total: int) -> None:
        stages[stage] = stages.get(stage, 0) + (done == total)

    model = afpq.quantize(lenet, data=digits, samples=64, max_drop=2, mode="quick", progress=count)

    assert stages["calibrate"] == stages["formats"] == stages["sensitivity"] == 1
    assert model.facts.goal is not None
    assert stages["encode"] == len(model.facts.goal["trials"]) > 3


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_model_is_found_with_any_number_of_threads(
    lenet: Path, digits: dict[str, Any], threads: int
) -> None:
    one, other = (
        afpq.quantize(lenet, data=digits, samples=48, max_drop=4, mode="quick", threads=t)
        for t in (2, threads)
    )
    assert one.plan is not None and other.plan is not None
    assert one.plan.to_json() == other.plan.to_json()
    assert one.facts.goal == other.facts.goal


def test_a_missed_goal_gives_the_best_model(lenet: Path, digits: dict[str, Any]) -> None:
    """Weights of two bits alone cannot keep every class."""
    data = {"input": digits["input"]}
    model = afpq.quantize(
        lenet,
        data=data,
        samples=200,
        max_drop=0,
        mode="quick",
        overrides={"*": "e0m1"},
        bn_recal=False,
    )

    goal = model.facts.goal
    assert goal is not None and not goal["met"]
    assert goal["percent"] == min(t["percent"] for t in goal["trials"])
    assert goal["trials"][-1]["bits_per_weight"] <= 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_drop": 1}, "max_drop needs data"),
        ({"max_drop": 1, "bits": 4}, "one of plan, bits, size and max_drop"),
        ({"max_drop": -1}, r"max_drop -1 is not in the range 0\.\.100 percent"),
        ({"max_drop": math.nan}, "max_drop nan is not in the range"),
    ],
)
def test_bad_goals_are_named(lenet: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        afpq.quantize(lenet, **options)


def test_a_goal_needs_samples_to_judge_by(lenet: Path, digits: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="4 are too few to hold any out: give 8 or more"):
        afpq.quantize(lenet, data=digits, samples=4, max_drop=1)
