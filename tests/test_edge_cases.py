"""Whole runs on networks and data that are odd but legal, and on wishes that cannot be granted."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import build, constant, node, write

import afpq
from afpq.cli import main
from afpq.errors import NaNError, PlanError
from afpq.packed import read_packed
from afpq.plan import Plan

MODELS = Path(__file__).resolve().parents[1] / "models"
DIGITS = MODELS / "digits_calibration.npz"


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Square roots of differences that are just positive: coarse weights make some negative, and the output NaN."""
    weight, x = constant(256, 16), constant(64, 256, seed=1)
    sums = x @ weight
    nodes = [node("MatMul", "x w", "s"), node("Sub", "s z", "t"), node("Sqrt", "t", "y")]
    model = build(nodes, {"x": ["n", 256], "z": ["n", 16]}, {"w": weight})
    return write(tmp_path, model), {"x": x, "z": sums - np.float32(0.05) * sums.std()}


def test_output_that_is_nan_whatever_is_done_is_an_error(roots: tuple[Path, Any]) -> None:
    path, data = roots
    assert afpq.quantize(path, data=data, bits=8).facts.correction is not None
    with pytest.raises(NaNError, match="the quantized model gives NaN in output 'y'"):
        afpq.quantize(path, data=data, bits=3)


def test_models_whose_output_is_nan_do_not_end_the_search_for_the_smallest(
    roots: tuple[Path, Any],
) -> None:
    path, data = roots
    model = afpq.quantize(path, data=data, max_drop=100, mode="quick")

    goal = model.facts.goal
    assert goal is not None and goal["met"]
    assert any(trial["percent"] is None for trial in goal["trials"])


def test_one_way_that_gives_nan_leaves_the_others(
    roots: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = roots
    from afpq import _ways

    found = _ways.find_ways

    def with_one_broken(*arguments: Any) -> Any:
        ways, notes = found(*arguments)
        way = ways[_ways.BIAS_CORRECTION]
        (name,) = (layer.name for layer in arguments[0].model.layers)
        ways[_ways.BIAS_CORRECTION] = _ways.Way(
            way.tensors, {name: np.full(16, -1000, np.float32)}, way.sqnr
        )
        return ways, notes

    monkeypatch.setattr("afpq._build.find_ways", with_one_broken)
    correction = afpq.quantize(path, data=data, bits=8).facts.correction

    assert correction is not None
    assert _ways.BIAS_CORRECTION not in correction["losses"] and correction["losses"]
    assert f"{_ways.BIAS_CORRECTION} was left out: its output is NaN" in correction["notes"]


@pytest.mark.parametrize("mode", ["quick", "default"])
def test_a_large_fixed_batch_is_calibrated_on(tmp_path: Path, mode: str) -> None:
    """More samples belong together than any part of a run would take by itself."""
    model = build([node("MatMul", "x w")], {"x": [300, 16]}, {"w": constant(16, 8)})
    result = afpq.quantize(
        write(tmp_path, model), data={"x": constant(1200, 16, seed=1)}, bits=6, mode=mode
    )

    assert result.facts.correction is not None
    assert result.facts.correction["held_out_samples"] == 300


def test_reports_hold_losses_of_outputs_that_are_zero(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "s"), node("Sub", "s s", "d"), node("MatMul", "x v", "t")]
    nodes += [node("Mul", "t zero", "z"), node("Add", "d z", "y")]
    constants = {
        "w": constant(16, 8),
        "v": constant(16, 8, seed=2),
        "zero": np.zeros(8, np.float32),
    }
    path = write(tmp_path, build(nodes, {"x": ["n", 16]}, constants))
    model = afpq.quantize(path, data={"x": constant(32, 16, seed=1)}, bits=6)
    model.save(tmp_path / "out.onnx")

    model.report(tmp_path / "r.json")

    assert json.loads((tmp_path / "r.json").read_text())["correction"]["losses"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equalize": True, "bits": 4}, "equalize needs data"),
        ({"max_drop": 1}, "max_drop needs data"),
        ({"equalize": True, "max_drop": 1, "data": DIGITS}, "not max_drop"),
        ({"equalize": True, "data": DIGITS, "samples": 4}, "4 are too few .*: give 8 or more$"),
    ],
)
def test_what_cannot_be_judged_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        afpq.quantize(MODELS / "lenet5_digits.onnx", **options)


def test_too_few_samples_name_the_batch_that_they_come_in(tmp_path: Path) -> None:
    model = build([node("MatMul", "x w")], {"x": [32, 16]}, {"w": constant(16, 8)})
    with pytest.raises(PlanError, match=r"give 64 or more \(they come 32 at a time\)"):
        afpq.quantize(write(tmp_path, model), data={"x": constant(32, 16)}, max_drop=1)


def test_the_saved_plan_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An equalised network reads other numbers, so it has other static formats than the one that was searched."""
    losses = iter([2.0, 1.0])  # of the network as it was, then of the equalised one
    monkeypatch.setattr(
        importlib.import_module("afpq.quantize"), "_held_out_loss", lambda facts: next(losses)
    )
    out, plan = tmp_path / "out.onnx", tmp_path / "plan.json"
    command = [
        "quantize",
        str(MODELS / "resnet_digits.onnx"),
        "-o",
        str(out),
        "--calib",
        str(DIGITS),
    ]
    command += ["--samples", "32", "--bits", "4", "--mode", "quick", "--activations", "a8"]

    assert main([*command, "--equalize", "--save-plan", str(plan)]) == 0

    saved, written = Plan.from_json(plan.read_text()), read_packed(out)
    assert written.metadata["afpq.plan_hash"] == saved.plan_hash
    fields = [layer.node.attributes for layer in written.layers]
    static = {
        (f[f"{what}_format"].value, f[f"{what}_scale"].value)
        for f in fields
        for what in ("activation", "residual")
        if f"{what}_format" in f
    }
    assert static == {(str(e.format), e.scale) for e in saved.activations or ()}
