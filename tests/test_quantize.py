"""The pipeline on a small real network: budgets, choices, determinism, what is written and what is not."""

import errno
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afpq
from afpq.errors import ModelError, PlanError, RuntimeUnavailableError
from afpq.graph import load_model
from afpq.packed import read_packed
from afpq.plan import Plan
from afpq.quantize import file_size, find_plan, load, prepare, quantize

DATA = "digits_calibration.npz"


@pytest.fixture(scope="module")
def lenet(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue("models")) / "lenet5_digits.onnx"


@pytest.fixture(scope="module")
def digits(lenet: Path) -> dict[str, Any]:
    with np.load(lenet.parent / DATA) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def calibrated(lenet: Path, digits: dict[str, Any]) -> afpq.QuantizedModel:
    return quantize(lenet, data=digits, bits=4, samples=64)


@pytest.mark.parametrize("bits", [2.5, 4, 6, 8])
def test_bits_per_weight_stay_within_the_budget(lenet: Path, tmp_path: Path, bits: float) -> None:
    model = quantize(lenet, bits=bits)
    model.save(tmp_path / "out.onnx")

    assert model.plan is not None and model.plan.bits_per_weight <= bits
    size = model.summary()["size"]
    assert size["bits_per_weight"] == pytest.approx(model.plan.bits_per_weight)


def test_without_a_budget_five_bits_are_taken(lenet: Path) -> None:
    job = prepare(lenet)

    assert job.bits == 5
    assert job.budget == "5 bits per weight"


@pytest.mark.parametrize("size", [25_000, 30_000, 45_678])
@pytest.mark.parametrize(
    ("calibrated", "activations"), [(False, "a16"), (True, "a16"), (True, "a8")]
)
def test_size_limits_the_whole_file(
    lenet: Path,
    digits: dict[str, Any],
    tmp_path: Path,
    size: int,
    calibrated: bool,
    activations: str,
) -> None:
    data = digits if calibrated else None
    model = quantize(lenet, size=size, data=data, samples=16, activations=activations)

    written = model.save(tmp_path / "out.onnx")

    assert written == (tmp_path / "out.onnx").stat().st_size
    assert 0.95 * size < written <= size


def test_file_size_is_exact_before_anything_is_encoded(lenet: Path, tmp_path: Path) -> None:
    job = prepare(lenet, bits=4)
    plan, _ = find_plan(job)

    expected = file_size(job, plan)

    assert quantize(lenet, plan).save(tmp_path / "out.onnx") == expected


def test_calibration_reports_held_out_samples_and_correction(
    calibrated: afpq.QuantizedModel,
) -> None:
    facts = calibrated.facts

    assert facts.calibration is not None and facts.correction is not None
    assert facts.calibration["samples"] == 48
    assert facts.calibration["held_out_samples"] == 16
    losses = facts.correction["losses"]
    assert set(losses) == {
        "nearest rounding",
        "bias correction",
        "compensated rounding",
        "compensated rounding, statistics restored",
    }
    assert facts.correction["bn_recal"] == {
        "loss_before": losses["compensated rounding"],
        "loss_after": losses["compensated rounding, statistics restored"],
    }
    assert losses[facts.correction["kept"]] == min(losses.values())
    assert losses["compensated rounding"] < losses["nearest rounding"] / 2
    assert facts.accuracy is not None and facts.accuracy["num_samples"] == 16


def test_quick_mode_rounds_to_nearest(lenet: Path, digits: dict[str, Any]) -> None:
    model = quantize(lenet, data=digits, bits=4, samples=64, mode="quick")

    assert model.facts.correction is not None
    losses = model.facts.correction["losses"]
    restored = "nearest rounding, statistics restored"
    assert set(losses) == {"nearest rounding", "bias correction", restored}
    assert losses[restored] < losses["nearest rounding"] / 2


def test_best_mode_learns_rounding(
    lenet: Path, digits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("afpq.learn._STEPS", 16)
    stages = set()

    model = quantize(
        lenet,
        data=digits,
        bits=3,
        samples=64,
        mode="best",
        progress=lambda stage, done, total: stages.add(stage),
    )

    assert "learn" in stages
    assert model.facts.correction is not None
    assert "learned rounding" in model.facts.correction["losses"]
    assert model.facts.correction["notes"] == []


def test_best_mode_without_torch_is_refused_early(
    lenet: Path, digits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afpq._job.find_spec", lambda name: None)

    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'afpq\[torch\]'"):
        prepare(lenet, data=digits, mode="best")
    prepare(lenet, mode="best")  # nothing to learn from


def test_layers_that_compensation_passes_by_are_named(
    lenet: Path, digits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afpq._walk.MAX_K", 300)

    model = quantize(lenet, data=digits, bits=4, samples=64)

    assert model.facts.correction is not None
    (note,) = model.facts.correction["notes"]
    long = [layer.name for layer in load_model(lenet).layers if layer.k > 300]
    assert long and note.endswith(": " + ", ".join(long))


def test_what_was_kept_is_fitted_to_all_samples(lenet: Path, digits: dict[str, Any]) -> None:
    """The held-out quarter chooses first, then it serves as well; a model with a goal stays the one that was judged."""
    kept = quantize(lenet, data=digits, bits=3, samples=64)
    judged = quantize(lenet, data=digits, max_drop=50, samples=64)

    for model, samples in ((kept, 64), (judged, 48)):
        assert model.facts.correction is not None
        assert model.facts.correction["kept"].startswith("compensated rounding")
        assert model.facts.correction["fitted_samples"] == samples


def test_statistics_are_left_alone_on_request(lenet: Path, digits: dict[str, Any]) -> None:
    model = quantize(lenet, data=digits, bits=4, samples=24, mode="quick", bn_recal=False)

    assert model.facts.correction is not None
    assert set(model.facts.correction["losses"]) == {"nearest rounding", "bias correction"}
    assert model.facts.correction["bn_recal"] is None


def test_an_unknown_mode_is_refused(lenet: Path) -> None:
    with pytest.raises(PlanError, match="mode 'slow' is not one of quick, default, best"):
        prepare(lenet, mode="slow")


def test_packed_network_agrees_with_the_float_one(
    lenet: Path, calibrated: afpq.QuantizedModel
) -> None:
    with np.load(lenet.parent / "digits_evaluation.npz") as data:
        images, labels = data["input"], data["labels"]

    logits = calibrated.session().run(None, {"input": images})[0]

    assert (logits.argmax(1) == labels).mean() > 0.95


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bytes_do_not_depend_on_threads(
    lenet: Path, digits: dict[str, Any], tmp_path: Path, threads: int
) -> None:
    quantize(lenet, data=digits, samples=24, bits=4.5, threads=0).save(tmp_path / "a.onnx")
    quantize(lenet, data=digits, samples=24, bits=4.5, threads=threads).save(tmp_path / "b.onnx")

    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_seed_draws_the_held_out_samples(lenet: Path, digits: dict[str, Any]) -> None:
    jobs = [prepare(lenet, data=digits, seed=seed) for seed in (0, 1, 1, 2)]
    units = [tuple(job.held_out.units) for job in jobs if job.held_out is not None]

    assert len(units) == 4
    assert units[1] == units[2]
    assert len(set(units)) == 3
    for job in jobs:
        assert job.fit is not None and job.held_out is not None
        assert not set(job.fit.units) & set(job.held_out.units)
        assert job.held_out.num_samples == 32


def test_few_samples_are_all_used_for_calibration(lenet: Path, digits: dict[str, Any]) -> None:
    model = quantize(lenet, data=digits, samples=7)

    assert model.facts.correction is None
    assert model.facts.calibration is not None and model.facts.calibration["samples"] == 7


def test_patterns_choose_layers_and_formats(lenet: Path, tmp_path: Path) -> None:
    model = quantize(lenet, exclude=["/0/*"], overrides={"/3/Conv": "e2m4"}, kind="integer")
    model.save(tmp_path / "out.onnx")

    layers = {layer.name: layer for layer in read_packed(tmp_path / "out.onnx").layers}
    assert sorted(layers) == ["/11/Gemm", "/3/Conv", "/7/Gemm", "/9/Gemm"]
    assert str(layers["/3/Conv"].format) == "e2m4"
    assert {layer.kind for layer in layers.values()} == {"integer"}
    assert [entry["name"] for entry in model.facts.left_float] == ["/0/Conv"]


def test_include_leaves_the_rest_float(lenet: Path, tmp_path: Path) -> None:
    quantize(lenet, include=["*/Conv"]).save(tmp_path / "out.onnx")

    layers = read_packed(tmp_path / "out.onnx").layers
    assert [layer.name for layer in layers] == ["/0/Conv", "/3/Conv"]


@pytest.mark.parametrize("activations", ["a16", "a8", "f32"])
def test_activation_mode_is_written_into_every_product(
    lenet: Path, tmp_path: Path, activations: str
) -> None:
    quantize(lenet, activations=activations).save(tmp_path / "out.onnx")

    layers = read_packed(tmp_path / "out.onnx").layers
    assert {layer.activations for layer in layers} == {activations}


def test_a_plan_is_followed(lenet: Path, tmp_path: Path) -> None:
    plan = find_plan(prepare(lenet, bits=6))[0]
    edited = Plan.from_json(plan.to_json().replace('"e2m3"', '"e0m5"'))

    quantize(lenet, edited).save(tmp_path / "out.onnx")

    packed = read_packed(tmp_path / "out.onnx")
    assert "e0m5" in {str(layer.format) for layer in packed.layers}
    assert packed.metadata["afpq.plan_hash"] == edited.plan_hash


def test_load_needs_only_the_file(calibrated: afpq.QuantizedModel, tmp_path: Path) -> None:
    calibrated.save(tmp_path / "out.onnx")
    image = np.zeros((2, 1, 28, 28), np.float32)

    loaded = load(tmp_path / "out.onnx")

    expected = calibrated.session().run(None, {"input": image})[0]
    np.testing.assert_array_equal(loaded.session().run(None, {"input": image})[0], expected)
    assert loaded.summary()["size"]["bits_per_weight"] <= 4


def test_load_refuses_a_float_model(lenet: Path) -> None:
    with pytest.raises(ModelError, match="not a packed model"):
        load(lenet)


def test_report_needs_a_saved_model(lenet: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="save the model"):
        quantize(lenet).report(tmp_path / "r.md")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, r"a budget of 2 bits per weight is impossible.* is the least"),
        ({"size": 10_000}, "a file of 10,000 bytes is impossible"),
    ],
)
def test_impossible_budgets_are_refused_before_calibration(
    lenet: Path, digits: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    job = prepare(lenet, data=digits, **options)
    stages: list[str] = []

    with pytest.raises(PlanError, match=message):
        find_plan(job, progress=lambda stage, done, total: stages.append(stage))
    assert stages == []


def test_a_full_disk_leaves_nothing_behind(
    lenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(lenet)
    (tmp_path / "out.onnx").write_bytes(b"before")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ModelError, match=r"out\.onnx: cannot be written: No space left"):
        model.save(tmp_path / "out.onnx")

    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_bytes() == b"before"


def test_a_file_that_does_not_run_is_not_kept(
    lenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(lenet)

    def broken(*_: object) -> None:
        raise ModelError("onnxruntime cannot load it")

    monkeypatch.setattr(importlib.import_module("afpq._quantized_model"), "try_file", broken)
    with pytest.raises(ModelError, match="cannot load"):
        model.save(tmp_path / "out.onnx")

    assert list(tmp_path.iterdir()) == []


def test_public_names_are_the_functions(lenet: Path) -> None:
    assert afpq.quantize is quantize
    assert callable(afpq.search) and callable(afpq.calibrate)
    assert set(afpq.__all__) <= set(dir(afpq))


def test_the_three_steps_of_the_readme(lenet: Path, digits: dict[str, Any], tmp_path: Path) -> None:
    stats = afpq.calibrate(lenet, digits, limit=16)
    plan = afpq.search(lenet, stats, bits=4.5)
    model = afpq.quantize(lenet, plan, stats)
    model.save(tmp_path / "out.onnx")
    model.report(tmp_path / "report.md")

    assert (tmp_path / "report.md").read_text().startswith("# out.onnx")
